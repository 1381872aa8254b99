"""The arithmetic behind the pictures of a sweep: the Pareto frontier, the curves, the numbers.

A sweep is the content of `sweep.json`; a point is one entry of its `points`: one sub-network with
its cost and quality, and a value for each axis (`with_every_field`). Needs the standard library
only. `mark_pareto` writes into its points; all else changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_moe.lab.schema import SweepPoint, full_values
from elastic_moe.routing.axes import THRESHOLD, TRAINED, Axis, was_trained
from elastic_moe.routing.names import is_listed, split_name

Point = Mapping[str, Any]
Sweep = Mapping[str, Any]  # as read from a file: any version, perhaps damaged


def full_point(points: Iterable[Point]) -> Point | None:
    """The full network's point; None in a sweep that was stopped before it was measured."""
    return next((p for p in points if p["name"] == "full"), None)


def flops(point: Point) -> float | None:
    """Floating-point operations per token: the cost that `pareto` means."""
    return finite(point.get("flops_per_token"))


def bits(point: Point) -> float | None:
    """Bits per byte: the quality that `pareto` means. Lower is better."""
    return finite(point.get("bits_per_byte"))


def decode_speed(point: Point) -> float | None:
    """Measured decode speed in tokens/s; None where it was not timed."""
    speed = finite(point.get("decode_tokens_per_second"))
    return speed if speed is not None and speed > 0 else None


def decode_time(point: Point) -> float | None:
    """Measured seconds per decoded token; None where it was not timed."""
    speed = decode_speed(point)
    return None if speed is None else 1 / speed


def decode_time_range(point: Point) -> tuple[float, float] | None:
    """Seconds per decoded token in the fastest and the slowest round; None where unknown."""
    slowest = finite(point.get("decode_tokens_per_second_min"))
    fastest = finite(point.get("decode_tokens_per_second_max"))
    return (1 / fastest, 1 / slowest) if slowest and fastest else None


def format_range(point: Point, kind: str) -> str:
    """A speed in the slowest and the fastest round, tokens per second: "951.2-988.0"; or "".

    Args:
        kind: prefill or decode.
    """
    key = f"{kind}_tokens_per_second"
    speed, slowest, fastest = (finite(point.get(f"{key}{end}")) for end in ("", "_min", "_max"))
    if speed is None or slowest is None or fastest is None:
        return ""
    return f"{slowest:.1f}-{fastest:.1f}"


def difference_error(a: Point, b: Point) -> float:
    """Standard error of the difference of two points' losses, nats per token.

    Paired: over the windows of their text. 0 where it is unknown, as for a single window.
    """
    first, second = a.get("window_deviations") or [], b.get("window_deviations") or []
    m = len(first)
    if m < 2 or m != len(second):
        return 0.0
    return math.sqrt(m / (m - 1)) * math.dist(first, second)


def finite(value: object) -> float | None:
    """`value` as a float; None for what is no number, NaN or infinite."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def pareto_flags(
    points: Sequence[Point],
    cost: Callable[[Point], float | None] = flops,
    cost_range: Callable[[Point], tuple[float, float] | None] = lambda _: None,
) -> list[bool]:
    """Which points are on the frontier of `cost` (lower is better) against bits per byte.

    Of two points on it, the dearer one has a loss that is lower by more than two standard errors of
    their difference, and the cheaper one's highest cost is below the dearer one's lowest. So where
    errors are unknown, a point is on it when no other is both at least as cheap and at least as
    good. Points equal in both do not exclude each other: otherwise they would, and leave a hole. A
    point without a finite cost or quality is never on it and excludes nobody.

    Args:
        cost_range: lowest and highest cost of a point that was measured; None where it is exact.
    """
    pairs = {
        i: (c, b)
        for i, p in enumerate(points)
        if (c := cost(p)) is not None and (b := bits(p)) is not None
    }

    def is_equal(a: int, b: int) -> bool:
        return pairs[a] == pairs[b] and not difference_error(points[a], points[b])

    def is_better(a: int, b: int) -> bool:
        error = 2 * difference_error(points[a], points[b])
        if not error:
            return pairs[a][1] < pairs[b][1]
        return float(points[b]["nats_per_token"]) - float(points[a]["nats_per_token"]) > error

    def is_cheaper(a: int, b: int) -> bool:
        (_, high), (low, _) = (cost_range(points[i]) or (pairs[i][0], pairs[i][0]) for i in (a, b))
        return high < low

    kept: list[int] = []
    # Cheapest first, and among equally cheap the best first: whoever does not improve on the last
    # point kept is excluded by it, and excludes those kept that are not certainly cheaper. It
    # improves on all that remain: differences add up, and their errors to no more than their sum.
    for index in sorted(pairs, key=lambda i: pairs[i]):
        if kept and is_equal(index, kept[-1]):
            kept.append(index)
        elif not kept or is_better(index, kept[-1]):
            while kept and not is_cheaper(kept[-1], index):
                kept.pop()
            kept.append(index)
    return [i in kept for i in range(len(points))]


def mark_pareto(points: Sequence[SweepPoint]) -> None:
    """Set `pareto` in every point: FLOPs per token against bits per byte."""
    for point, flag in zip(points, pareto_flags(points), strict=True):
        point["pareto"] = flag


def frontier(
    points: Sequence[Point],
    cost: Callable[[Point], float | None] = flops,
    cost_range: Callable[[Point], tuple[float, float] | None] = lambda _: None,
) -> list[Point]:
    """The points on the frontier, cheapest first; arguments are those of `pareto_flags`."""
    flags = pareto_flags(points, cost, cost_range)
    on_it = [p for p, flag in zip(points, flags, strict=True) if flag]
    return sorted(on_it, key=lambda p: (cost(p) or 0.0, str(p["name"])))


def changed_axes(point: Point, full: Mapping[str, Any]) -> list[Axis]:
    """The axes in which `point` differs from `full` (a point, or `full_values`).

    None stands for values that differ from layer to layer, where the name has a part of the axis;
    in other names nothing routes (all layers that run are dense), so nothing differs.
    """
    parts = split_name(str(point["name"]))
    return [
        axis
        for axis in TRAINED
        if point[axis.name] != full[axis.name]
        and (point[axis.name] is not None or parts is None or axis.name in parts)
    ]


def _is_beyond_numbers(name: str) -> bool:
    """Whether a name says what a point's numbers cannot: lists, or another axis such as m2."""
    parts = split_name(name)
    swept = {axis.name for axis in TRAINED}
    return parts is None or any(
        is_listed(part) or axis not in swept for axis, part in parts.items()
    )


def curves(points: Iterable[Point], full: Mapping[str, Any]) -> dict[str, list[Point]]:
    """For each axis, the points in which only that axis differs from the full network.

    Args:
        points: any points, in any order.
        full: the full network's point, or `full_values(model)` where it was not measured.

    Returns:
        For every axis' key, those points and the full one if it is there, by rising value.
    """
    result: dict[str, list[Point]] = {axis.name: [] for axis in TRAINED}
    for point in points:
        if _is_beyond_numbers(str(point["name"])):
            continue
        changed = changed_axes(point, full)
        if len(changed) <= 1:
            for axis in changed or TRAINED:
                if point[axis.name] is not None:
                    result[axis.name].append(point)
    for key, members in result.items():
        members.sort(key=lambda p: float(p[key]))
    return result


def untrained_axes(point: Point, model: Mapping[str, Any]) -> set[str]:
    """The keys of the axes whose value in `point` was not trained, as far as the model says."""
    trained = (model.get("elastic_moe") or {}).get("trained") or {}
    full = full_values(model)
    return {
        axis.name
        for axis in changed_axes(point, full)
        if not was_trained(axis, point[axis.name], full[axis.name], trained.get(str(axis.trained)))
    }


def use_layers(sweep: Sweep) -> tuple[list[int], list[list[float]]]:
    """The layers whose expert use was recorded, and the share of each expert in each of them."""
    use = sweep.get("expert_use") or {}
    rows = use.get("layers") or []
    return use.get("layer_ids") or list(range(len(rows))), rows


def ranking(sweep: Sweep) -> str:
    """What the channels were ranked on, in words; "" where they are in the checkpoint's order."""
    settings = sweep.get("settings") or {}
    digest = settings.get("rank_channels_sha256")
    if not digest:
        return ""
    text = settings.get("rank_channels") or f"a text of SHA-256 {str(digest)[:12]}"
    return f"channels of each expert ranked on {clean(text, 60)}"


def format_error(value: object, errors: int = 1) -> str:
    """So many standard errors: 0.0123, 2 -> "0.025"; None (a single window) -> "-"."""
    error = finite(value)
    return "-" if error is None else f"{errors * error:.3f}"


def threshold_cost_is_measured(points: Sequence[Point], full: Point) -> bool | None:
    """Whether FLOPs of points with a threshold count the experts that ran, or the upper bound.

    None where the sweep has no point to tell from: a threshold alone that dropped an expert.
    """
    sparse = [p for p in points if changed_axes(p, full) == [THRESHOLD]]
    sparse = [p for p in sparse if float(p["mean_experts"]) < float(full["mean_experts"])]
    if not sparse:
        return None
    return any(float(p["flops_per_token"]) < float(full["flops_per_token"]) for p in sparse)


@dataclass(frozen=True, slots=True)
class Pick:
    """The sub-network that the summary names: the cheapest one within `tolerance` of the full's
    bits per byte. All figures but `tolerance` are ratios to the full network's."""

    point: Point
    tolerance: float
    flops: float
    bits: float
    speed: float | None


def trained_points(points: Sequence[Point]) -> list[Point]:
    """The points that training drew; [] where that is the full network alone."""
    trained = [point for point in points if point.get("trained", True)]
    return trained if any(point["name"] != "full" for point in trained) else []


def pick(points: Sequence[Point], full: Point) -> Pick | None:
    """The point to name first: the cheapest within 2 %, else 5, 10 or 25 %, of the full's quality.

    A tolerance is passed over when its cheapest point saves less than a quarter of the FLOPs, and
    the last answer is None. Untrained points are not named, as nobody would run them on purpose,
    unless the checkpoint was not trained for any.
    """
    candidates = trained_points(points) or points
    full_flops, full_bits, full_speed = flops(full), bits(full), decode_speed(full)
    if not full_flops or not full_bits:
        return None
    for tolerance in (0.02, 0.05, 0.10, 0.25):
        near = [
            (c / full_flops, b / full_bits, p)
            for p in candidates
            if (c := flops(p)) is not None
            and (b := bits(p)) is not None
            and b <= full_bits * (1 + tolerance)
        ]
        if near:
            cost, quality, point = min(near, key=lambda item: item[:2])
            if cost <= 0.75:
                speed = decode_speed(point)
                ratio = speed / full_speed if speed and full_speed else None
                return Pick(point, tolerance, cost, quality, ratio)
    return None


SI_PREFIXES = ((12, "T"), (9, "G"), (6, "M"), (3, "k"))


def format_si(value: float | None, unit: str = "") -> str:
    """Three significant digits and an SI prefix: 15.2e6, "FLOP" -> "15.2 MFLOP"; None -> "-"."""
    if value is None:
        return "-"
    # 999,950 is 1.00 M: it would round to 1,000 k.
    exponent, prefix = next((e for e in SI_PREFIXES if abs(value) >= 0.9995 * 10 ** e[0]), (0, ""))
    return f"{_three_digits(value / 10**exponent)} {prefix}{unit}".rstrip()


def _three_digits(value: float) -> str:
    return f"{value:,.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def format_speed(value: float | None) -> str:
    """Tokens per second: 1234.4 -> "1,234 tok/s", 42.17 -> "42.2 tok/s"; None -> "-"."""
    return "-" if value is None else f"{_three_digits(value)} tok/s"


def format_value(value: Any) -> str:
    """A value of an axis, short: 0.7 rather than 0.699999988079071. None (no one value): "-"."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_percent(ratio: float | None, digits: int = 0) -> str:
    """A ratio as a percentage: 0.614 -> "61 %"; None -> "-"."""
    return "-" if ratio is None else f"{100 * ratio:.{digits}f} %"


def clean(text: object, limit: int = 80) -> str:
    """`text` as one printable line of at most `limit` characters.

    Names come from files of unknown origin. Control characters, lone surrogates and direction
    overrides are no part of valid XML or of an honest label; each becomes U+FFFD.
    """
    line = "".join(c if c.isprintable() else "�" for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"
