"""What has to hold of the engine; as `bars`, which says how bars are judged."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.bars import DECODE_16, Bar, Round, Value, other

MIXES = {
    "k": ("full", "k4", "k2", "k1"),
    "width": ("full", "w6", "w4", "w2"),
    "depth": ("full", "L6", "L4", "L2"),
}
REPEATED = ("full", "L4")  # the second one finds what the first left


def mixing(names: Sequence[str]) -> Value:
    """Seconds per byte of a mixed batch, over those of its sub-networks alone."""

    def value(r: Round) -> float:
        seconds = sum(r.other[f"{name} seconds"] for name in names)
        size = sum(r.other[f"{name} bytes"] for name in names)
        return (r.seconds["ours"] / r.touched_bytes) / (seconds / size)

    return value


def shorter(name: str) -> Value:
    """How many times shorter the time to the first token is when its prompt was read before."""
    return lambda r: r.other[f"{name} cold"] / r.other[f"{name} warm"]


ENGINE_BARS: dict[str, list[Bar]] = {
    "engine16": [
        Bar("over one sequence", lambda r: 16 * r.other["one seconds"] / r.seconds["ours"], 2.5),
        DECODE_16,
        Bar("us outside the native call", other("outside seconds", 1e6), 400.0, at_most=True),
    ],
    **{
        f"mix {axis}": [Bar("seconds per byte over uniform", mixing(names), 1.1, at_most=True)]
        for axis, names in MIXES.items()
    },
    "prefix": [Bar(f"{name}: TTFT, its prefix cached", shorter(name), 5.0) for name in REPEATED],
    "load": [],  # figures alone
}
