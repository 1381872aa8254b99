"""A bar held against the rounds of a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a bar came out; `met` is None where a contestant was missing."""

    name: str
    values: tuple[float, ...]
    median: float | None
    least: float | None
    most: float | None
    bar: float
    goal: float | None
    met: bool | None
    goal_met: bool | None
    direction: Literal[">=", "<="]

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as the result files hold them."""
        return asdict(self)

    def __str__(self) -> str:
        state = {True: "met", False: "MISSED", None: "not measured"}
        line = f"{state[self.met]:12} {self.name}: "
        if self.median is None:
            return f"{line}bar {self.direction} {self.bar:g}"
        line += (
            f"{self.median:.3f} ({self.least:.3f} to {self.most:.3f} in {len(self.values)} rounds)"
        )
        line += f", bar {self.direction} {self.bar:g}"
        return line if self.goal is None else f"{line}, goal {self.goal:g} {state[self.goal_met]}"


def verdict(name: str, values: Sequence[float], bar: float, *, at_most: bool = False) -> Verdict:
    """Hold a bar against the median of what the rounds gave."""
    median = statistics.median(values)
    return Verdict(
        name,
        tuple(values),
        median,
        min(values),
        max(values),
        bar,
        None,
        median <= bar if at_most else median >= bar,
        None,
        "<=" if at_most else ">=",
    )


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "values": list(values),
    }
