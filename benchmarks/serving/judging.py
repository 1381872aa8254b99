"""Figures and bars of the serving benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.bars import Verdict


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


def told(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "values": list(values),
    }
