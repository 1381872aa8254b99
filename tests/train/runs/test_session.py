"""How long the next step may take is read from the last ones, of this sitting or of one before."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.runs.session import StepPace, forget_steps_after

PLAN = TrainingPlan(stages=parse_stages("2x10x1x128,6x10x2x128"))


def test_the_next_step_is_taken_to_be_as_long_as_the_longest_of_the_last_eight() -> None:
    pace = StepPace(PLAN, [], first_seconds=4.0)
    assert pace.expected(0) == 4.0
    for step, seconds in ((1, 9.0), (2, 1.0), (3, 3.0)):
        pace.learn({"step": step, "seconds": seconds})
    assert pace.expected(3) == pytest.approx(9.0)
    for step in range(4, 10):
        pace.learn({"step": step, "seconds": 2.0})
    assert pace.expected(9) == pytest.approx(3.0)  # the longest is forgotten
    assert pace.expected(10) == pytest.approx(3.0 * 6)  # three times the layers, twice the tokens


def test_records_of_an_earlier_sitting_count_and_may_lack_the_seconds() -> None:
    records = [{"step": 9, "seconds": 2.0}, {"step": 10}, {"step": 11, "seconds": 24.0}]
    assert StepPace(PLAN, records, first_seconds=50.0).expected(11) == pytest.approx(24.0)
    assert StepPace(PLAN, records[:1]).expected(10) == pytest.approx(12.0)
    assert StepPace(PLAN, records[1:2], first_seconds=50.0).expected(10) == 0.0


def test_a_step_fits_if_it_would_be_done_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    pace = StepPace(PLAN, [], first_seconds=4.0)
    assert pace.fits(0, 104.0)
    assert not pace.fits(0, 103.9)
    assert pace.fits(0, math.inf)
    unknown = StepPace(PLAN, [])
    assert unknown.fits(0, 100.1)
    assert not unknown.fits(0, 100.0)


def test_lines_of_steps_that_a_kill_undid_are_cut(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert forget_steps_after(3, log) == []
    assert not log.exists()
    records = [{"step": step, "seconds": 0.5} for step in range(1, 6)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 6, "se')
    assert forget_steps_after(3, log) == records[:3]
    assert [json.loads(line) for line in log.read_text().splitlines()] == records[:3]
