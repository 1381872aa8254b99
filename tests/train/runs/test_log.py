"""The log of a run is cut back to the state that a kill left."""

from __future__ import annotations

import json
from pathlib import Path

from elastic_moe.train.runs.log import drop_records_after


def test_lines_of_steps_that_a_kill_undid_are_cut(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert drop_records_after(3, log) == []
    assert not log.exists()
    records = [{"step": step, "seconds": 0.5} for step in range(1, 6)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 6, "se')
    assert drop_records_after(3, log) == records[:3]
    assert [json.loads(line) for line in log.read_text().splitlines()] == records[:3]
