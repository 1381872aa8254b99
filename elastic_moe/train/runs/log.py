"""The log of a run: `log.jsonl`, a line per step, and `log.csv`, the same as a table.

A run appends lines of JSON, and cuts them back when it resumes: a crash spoils at
most the last. The table is made of them whenever a run ends, for spreadsheets and pandas.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_moe.errors import TrainingError
from elastic_moe.files import write_text
from elastic_moe.routing import ModelShape, resolve
from elastic_moe.train.step.plan import TrainingPlan

LOG, TABLE = "log.jsonl", "log.csv"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's steps, in order; a last line that a kill cut short is left out.

    Raises:
        TrainingError: a line is no record of a later step than those before it.
    """
    return [record for _, record in read_lines(folder / LOG)]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """As `read_log`, each record with its line."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.splitlines()
    found: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # the line that a kill cut short
                break
            record = None
        before = found[-1][1]["step"] if found else 0
        wrong = _what_is_wrong(record, before)
        if wrong:
            raise TrainingError(
                f"{path}, line {number}: {wrong}. Restore the file, or delete it: the state does "
                f"not need it, and only times and losses of past steps are lost."
            )
        found.append((line, record))
    return found


def _what_is_wrong(record: Any, before: int) -> str:
    """Why a line cannot be the record of a step after step `before`; "" if it can."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return "no record of a step"
    if record["step"] <= before:
        return f"step {record['step']} after step {before}"
    seconds = record.get("seconds", 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        return f"seconds must be a number of at least 0, got {seconds!r:.50}"
    return ""


def drop_records_after(step: int, log: Path) -> list[dict[str, Any]]:
    """Drop the lines of steps that a kill undid: they will be run, and written, again.

    Returns:
        The records that stay.

    Raises:
        TrainingError: as `read_log`.
    """
    if not log.exists():
        return []
    kept = [(line, record) for line, record in read_lines(log) if record["step"] <= step]
    write_text(log, "".join(f"{line}\n" for line, _ in kept))
    return [record for _, record in kept]


def write_table(folder: Path) -> Path:
    """Write `log.csv` from `log.jsonl`; a column for every key, lists joined by spaces."""
    records = read_log(folder)
    columns = dict.fromkeys(key for record in records for key in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in record.items()}
        )
    write_text(folder / TABLE, text.getvalue())
    return folder / TABLE


def split_records(
    records: Sequence[dict[str, Any]], plan: TrainingPlan, shape: ModelShape
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of passes that ran the full network, as far as it had grown, and of the others.

    A step is one pass, the two of a split or the three of a sandwich, of which each gets a record
    of its own here.
    """
    whole = {
        stage.layers: resolve(shape, active_layers=stage.grown(shape.num_layers)).name
        for stage in plan.stages
    }
    full: list[dict[str, Any]] = []
    reduced: list[dict[str, Any]] = []
    for record in records:
        others = (
            {**record, "subnet": name, "loss": loss}
            for kind in ("sandwich", "split")
            for name, loss in zip(
                record.get(kind, ()), record.get(f"{kind}_loss", ()), strict=False
            )
        )
        for one in (record, *others):
            (full if one["subnet"] == whole[one["layers"]] else reduced).append(one)
    return full, reduced


def last_loss(records: Sequence[dict[str, Any]]) -> float | None:
    """The mean loss of the last fiftieth of the records, or of four; None without any."""
    last = [record["loss"] for record in records[-max(4, len(records) // 50) :]]
    return round(sum(last) / len(last), 4) if last else None
