"""The folder of results: an earlier sweep there is continued, shown again, or in the way."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from elastic_moe.errors import ElasticMoEError, ResultExistsError
from elastic_moe.lab.schema import (
    ADDED_FIELDS,
    POINT_FIELDS,
    SCHEMA_VERSION,
    ExpertUse,
    SweepPoint,
    SweepResult,
    with_every_field,
)
from elastic_moe.routing import shorten
from elastic_moe.routing.axes import TRAINED

RESULT, PREVIOUS = "sweep.json", "sweep.previous.json"

# Points are comparable only if all of this is equal.
_MUST_AGREE = ("schema_version", "corpus", "settings", "machine", "versions")


@dataclass(slots=True)
class Earlier:
    """The results of an earlier sweep in the same folder.

    Attributes:
        why_not: why it is not continued; "" where it is, or where there is nothing.
        points, expert_use: what is taken over; nothing where it is not continued.
        finished: the very sweep that was asked for, complete, so that nothing is left to measure.
    """

    why_not: str = ""
    points: list[SweepPoint] = field(default_factory=list)
    expert_use: ExpertUse | None = None
    finished: SweepResult | None = None


def prepare_folder(folder: Path) -> None:
    """Make `folder` and test that it can be written, so that a sweep does not fail after measuring.

    Raises:
        ElasticMoEError: it is a file, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"test")
    except OSError as error:
        raise ElasticMoEError(
            f"--out {folder}: the results cannot be written there: {error.strerror}. "
            f"Name a folder that you may write to."
        ) from error


def read_earlier(
    folder: Path, present: SweepResult, names: Collection[str], *, overwrite: bool = False
) -> Earlier:
    """The results in `folder` that the sweep about to run can keep.

    Args:
        present: the result so far of the sweep that is about to run.
        names: the sub-networks of its grid.
        overwrite: whether it may replace any result.

    Raises:
        ResultExistsError: `sweep.json` is of another sweep, and may not be replaced.
        ElasticMoEError: `sweep.json` is none.
    """
    path = folder / RESULT
    if not path.exists():
        return Earlier()
    earlier = _read(path)
    if not earlier["points"]:
        return Earlier()
    unlike = "; ".join(differences(earlier, present))
    if overwrite:
        state = "it is complete" if earlier["complete"] else "it is to be replaced"
        return Earlier(unlike or state)
    if not unlike and not earlier["complete"]:
        return Earlier("", earlier["points"], earlier["expert_use"])
    unlike = unlike or _other_grid(earlier, names)
    if unlike:
        state = "finished" if earlier["complete"] else "unfinished"
        raise ResultExistsError(
            f"{path} is the {state} result of another sweep: {unlike}. Nothing was measured. "
            f"Name another folder with --out, or pass --overwrite to replace it."
        )
    return Earlier(finished=earlier)


def _other_grid(earlier: SweepResult, names: Collection[str]) -> str:
    """How the grid of a complete sweep differs from these names; "" if it does not.

    Its grid is what it timed: points that it took over from outside have no speed.
    """
    timed = [p["name"] for p in earlier["points"] if p["decode_tokens_per_second"] is not None]
    there = [point["name"] for point in earlier["points"]]
    missing = [name for name in names if name not in there]
    extra = [name for name in timed if name not in names]
    parts = [f"it lacks {_list_names(missing)}"] * bool(missing)
    parts += [f"it also has {_list_names(extra)}"] * bool(extra)
    return " and ".join(parts)


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def differences(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Settings that make two sweeps incomparable, as in "dtype was 'float32', is 'bfloat16'"."""
    found = []
    for key in _MUST_AGREE:
        old, new = earlier[key], present[key]
        if not (isinstance(old, dict) and isinstance(new, dict)):
            old, new, prefix = {key: old}, {key: new}, ""
        else:
            prefix = f"{key}."
        # Of a machine, earlier versions wrote less.
        names = old if key == "machine" else [*new, *(name for name in old if name not in new)]
        found += [
            f"{prefix}{name} was {_short(old.get(name))}, is {_short(new.get(name))}"
            for name in names
            if old.get(name) != new.get(name)
        ]
    return found


def keep_aside(folder: Path) -> None:
    """Make way for a new `sweep.json`: the old one becomes `sweep.previous.json`."""
    path = folder / RESULT
    if path.exists():
        path.replace(folder / PREVIOUS)


def _read(path: Path) -> SweepResult:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ElasticMoEError(f"{path} is no JSON ({error}). Move it away or use --out.") from error
    problem = _problem(data)
    if problem:
        raise ElasticMoEError(f"{path} is no sweep: {problem}. Move it away or use --out.")
    known = data["schema_version"] == SCHEMA_VERSION
    return cast(SweepResult, with_every_field(data) if known else data)


def _problem(data: Any) -> str:
    """Why this is no sweep; "" if it is one. Of another schema only what every one has."""
    if not isinstance(data, dict):
        return f"it must hold a JSON object, got {type(data).__name__}"
    wanted = [*_MUST_AGREE, "points", "complete", "expert_use"]
    lacking = [key for key in wanted if key not in data]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    points = data["points"]
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        return f"points must be a list of objects, got {shorten(points)}"
    if data["schema_version"] != SCHEMA_VERSION:
        return ""
    if not isinstance(data.get("model"), dict):
        return f"model must be an object, got {shorten(data.get('model'))}"
    added = {*ADDED_FIELDS, *(axis.name for axis in TRAINED)}  # after the file, if it lacks one
    for i, point in enumerate(points):
        lacking = [key for key in POINT_FIELDS if key not in point and key not in added]
        if lacking:
            return f"points[{i}] lacks {', '.join(lacking)}"
    return ""


def _short(value: object) -> str:
    text = shorten(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
