"""The frontier of a sweep as a plot, drawn with matplotlib's objects: no pyplot, no global state.

Quality always points up: bits per byte and losses are drawn on axes turned over, and say so.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from elastic_moe.files import write_bytes
from elastic_moe.lab.load import busy_warning
from elastic_moe.lab.schema import with_every_field
from elastic_moe.lab.view.frontier import (
    SI_PREFIXES,
    Point,
    Sweep,
    bits,
    clean,
    decode_speed,
    decode_time,
    decode_time_range,
    flops,
    frontier,
    ranking,
)
from elastic_moe.lab.view.labels import Box, Segment, place_labels
from elastic_moe.lab.view.style import (
    INK,
    MUTED,
    PAPER,
    SHAPE_NAMES,
    SHAPES,
    depth_colours,
    drawing_style,
    marker_size,
    shape_of,
)
from elastic_moe.routing.axes import DEPTH, TOP_K

Panel = Literal["both", "speed", "flops"]


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of the sweep in one panel: x in tokens/s or FLOPs, y in bits per byte."""

    point: Point
    index: int  # in sweep["points"]
    x: float
    y: float
    diameter: float  # in typographic points


def frontier_figure(sweep: Sweep, panel: Panel = "both") -> Figure:
    """Quality against cost, each sub-network a dot: the picture for a README.

    Args:
        sweep: the content of `sweep.json`, complete or not.
        panel: "both" draws measured decode speed and FLOPs per token side by side, with title and
            legend; the others draw one of them alone, for a page that has its own title and legend.
            Without timings "both" draws the FLOPs alone.
    """
    sweep = with_every_field(sweep)
    points = sweep["points"]
    kinds: list[Panel] = [panel]
    if panel == "both":
        kinds = ["speed", "flops"] if any(map(decode_speed, points)) else ["flops"]
    alone = panel != "both"
    with drawing_style():
        figure = Figure(figsize=(5.0, 4.5) if alone else (11.4, 5.4), layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        row = list(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0])
        drawn = [_draw_dots(axes, sweep, kind) for axes, kind in zip(row, kinds, strict=True)]
        row[0].set_ylabel("bits per byte: lower is better, so up is better")
        if not alone:
            _title(figure, sweep)
            _legend(figure, sweep)
        figure.draw_without_rendering()  # settles the layout: where labels fit depends on it
        for axes, kind, dots in zip(row, kinds, drawn, strict=True):
            _label_frontier(axes, dots, kind)
        return figure


def _frontier_of(dots: Sequence[Dot], kind: Panel) -> list[Dot]:
    """The dots on the frontier, cheapest first: fastest, or of the fewest FLOPs."""
    points, speed = [d.point for d in dots], kind == "speed"
    edge = frontier(points, decode_time, decode_time_range) if speed else frontier(points, flops)
    return [next(d for d in dots if d.point is point) for point in edge]


def _draw_dots(axes: Axes, sweep: Sweep, kind: Panel) -> list[Dot]:
    """Draw every point that has an x and a y. Ids in the SVG are the points' indices."""
    speed = kind == "speed"
    max_k = int(sweep["model"][str(TOP_K.size)])
    dots = [
        Dot(p, i, x, y, marker_size(p[TOP_K.name], max_k))
        for i, p in enumerate(sweep["points"])
        if (x := (decode_speed if speed else flops)(p)) is not None and (y := bits(p)) is not None
    ]
    if not dots:
        axes.text(0.5, 0.5, "nothing measured yet", transform=axes.transAxes, ha="center")
        axes.set_axis_off()
        return dots
    if speed:
        axes.set_xlabel("decode speed, tokens/s, measured: right is better")
    _scale_x(axes, [d.x for d in dots], from_zero=not speed)
    axes.yaxis.set_inverted(True)
    axes.margins(y=0.09)

    colours = depth_colours([p[DEPTH.name] for p in sweep["points"]])
    # A thin thread through each depth's dots, so that the eye can follow top-k.
    for depth, colour in colours.items():
        grid = [d for d in dots if d.point[DEPTH.name] == depth and shape_of(d.point, sweep) == ""]
        grid.sort(key=lambda d: d.point[TOP_K.name] or 0)
        axes.plot([d.x for d in grid], [d.y for d in grid], color=colour, lw=1, gid="thread")
    # "post" keeps the cheaper one's quality until the next better one can be paid for.
    edge = _frontier_of(dots, kind)
    xs, ys = [d.x for d in edge], [d.y for d in edge]
    axes.step(xs, ys, where="post", color=INK, lw=1.3, zorder=2.5, gid="frontier")
    for dot in dots if speed else ():
        if ends := decode_time_range(dot.point):
            colour, xs = colours[dot.point[DEPTH.name]], [1 / end for end in ends]
            axes.plot(xs, [dot.y, dot.y], color=colour, lw=1.6, zorder=2.8, gid="spread")
    for dot in dots:
        colour, hollow = colours[dot.point[DEPTH.name]], not dot.point.get("trained", True)
        axes.plot(
            [dot.x],
            [dot.y],
            SHAPES[shape_of(dot.point, sweep)],
            markersize=dot.diameter,
            markeredgecolor=colour if hollow else INK,
            markerfacecolor=PAPER if hollow else colour,
            markeredgewidth=1.6 if hollow else 0.7,
            zorder=3,
            gid=f"point-{dot.index}",
        )
    corner, side, arrow = (1.0, "right", "better ↗") if speed else (0.0, "left", "↖ better")
    note: dict[str, Any] = {"ha": side, "color": MUTED, "size": 9}
    axes.text(corner, 1.005, arrow, transform=axes.transAxes, va="bottom", **note)
    full = next((d for d in dots if d.point["name"] == "full"), None)
    if full is not None:
        axes.axhline(full.y, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1.5, gid="full")
        axes.annotate(
            f"full network {full.y:.3f}",
            (corner, full.y),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-3 if speed else 3, -3),
            textcoords="offset points",
            va="top",
            **note,
        )
    return dots


def _scale_x(axes: Axes, values: Sequence[float], *, from_zero: bool) -> None:
    """Logarithmic only for a wide range. FLOPs start at zero: half as far is half the cost.

    Their numbers on the axis are plain; the power of ten goes into the label's unit.
    """
    low, high = min(values), max(values)
    exponent, prefix = 0, ""
    if from_zero:
        exponent, prefix = next((e for e in SI_PREFIXES if high >= 10 ** e[0]), (0, ""))
        axes.set_xlabel(f"{prefix}FLOP per token, counted: left is better")
    if high > 25 * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif from_zero:
        axes.set_xlim(0, high * 1.07)
    else:
        axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 10**exponent:,.10g}"))


def _label_frontier(axes: Axes, dots: Sequence[Dot], kind: Panel) -> None:
    """Write the names of the frontier's points where they cover nothing."""
    scale = axes.figure.dpi / 72  # pixels in a typographic point
    to_pixels, from_pixels = axes.transData.transform, axes.transData.inverted().transform
    frame = axes.get_window_extent()
    edge = _frontier_of(dots, kind)

    def box_of(dot: Dot) -> Box:
        (x, y), half = to_pixels((dot.x, dot.y)), (dot.diameter / 2 + 1) * scale
        return Box(x - half, y - half, x + half, y + half)

    other_texts = [Box(*map(float, text.get_window_extent().extents)) for text in axes.texts]
    lines: list[Segment] = []
    corners = [tuple(to_pixels((d.x, d.y))) for d in edge]
    for (ax, ay), (bx, by) in pairwise(corners):
        lines += [((ax, ay), (bx, ay)), ((bx, ay), (bx, by))]
    for line in axes.lines:
        if line.get_gid() in ("thread", "full", "spread"):
            corners = [tuple(c) for c in line.get_transform().transform(line.get_xydata())]
            lines += pairwise(corners)

    labels = [axes.text(0, 0, clean(d.point["name"], 24), size=8.5, gid="label") for d in edge]
    extents = [label.get_window_extent() for label in labels]
    places = place_labels(
        [box_of(dot) for dot in edge],
        [(e.width + 4 * scale, e.height + scale) for e in extents],
        [*map(box_of, dots), *other_texts],
        lines,
        Box(*map(float, frame.extents)),
        (1.0, 0.5) if kind == "speed" else (-1.0, 0.5),
    )
    for label, place, dot in zip(labels, places, edge, strict=True):
        if place is None:
            label.remove()  # the table and the tooltips still name it
            continue
        label.set(position=from_pixels(place.centre), ha="center", va="center_baseline")
        label.set_in_layout(False)
        start = box_of(dot).centre
        end = place.nearest(*start)
        # A line to its dot where the label is far from it, or as near to another one.
        reach = math.dist(start, end)
        nearest = min(
            (
                math.dist(c, place.nearest(*c))
                for d in dots
                if d is not dot
                for c in [box_of(d).centre]
            ),
            default=math.inf,
        )
        if reach > (dot.diameter / 2 + 8) * scale or nearest < reach + 3 * scale:
            ends = from_pixels([start, end])
            axes.plot(ends[:, 0], ends[:, 1], color=MUTED, lw=0.8, zorder=3.5)


def _title(figure: Figure, sweep: Sweep) -> None:
    corpus, count = sweep["corpus"], len(sweep["points"])
    state = "" if sweep.get("complete", True) else ", stopped early"
    name = clean(sweep["model"]["name"], 50)
    figure.suptitle(
        f"{name}: {count} sub-networks of one checkpoint{state}\n",
        x=0.012,
        ha="left",
        size=13,
        weight="bold",
    )
    dtype = clean(sweep["points"][0]["dtype"], 20) + ", " if count else ""
    ranked = f"; {ranking(sweep)}" if ranking(sweep) else ""
    busy = "; the machine was busy: speeds may be wrong" if busy_warning(sweep) else ""
    figure.text(
        0.012,
        0.94,
        f"on {clean(corpus['name'], 60)}: {corpus['scored_tokens']:,} scored tokens, {dtype}"
        f"{clean(sweep['machine'].get('cpu', 'unknown CPU'), 40)}{ranked}{busy}",
        color=MUTED,
        size=10,
        va="top",
    )


def _legend(figure: Figure, sweep: Sweep) -> None:
    def dot(label: str, shape: str, colour: str, k: int, hollow: bool = False) -> Line2D:
        handle = Line2D([], [], ls="", marker=SHAPES[shape], label=label)
        handle.set_markersize(marker_size(k, max_k))
        handle.set_markeredgecolor(MUTED if hollow else INK)
        handle.set_markerfacecolor(PAPER if hollow else colour)
        handle.set_markeredgewidth(1.6 if hollow else 0.7)
        return handle

    def heading(text: str) -> Line2D:
        return Line2D([], [], ls="", label=text)

    points = sweep["points"]
    max_k = int(sweep["model"][str(TOP_K.size)])
    rows = [heading("Depth: layers that run")]
    colours = depth_colours([p[DEPTH.name] for p in points])
    rows += [dot(str(d), "", c, max_k) for d, c in sorted(colours.items(), reverse=True)][:12]
    rows += [heading(" "), heading("Size: experts per token")]
    ks = sorted({p[TOP_K.name] for p in points if p[TOP_K.name]}, reverse=True)
    rows += [dot(f"top-k {k}", "", MUTED, k) for k in ks][:8]
    shapes = {shape_of(p, sweep) for p in points}
    rows += [heading(" "), heading("Shape: what else changed")]
    rows += [dot(SHAPE_NAMES[s], s, MUTED, max_k) for s in SHAPES if s in shapes]
    if any(not p.get("trained", True) for p in points):
        rows.append(dot("hollow: not trained", "", MUTED, max_k, hollow=True))
    if any(map(decode_time_range, points)):
        rows += [heading(" "), Line2D([], [], color=MUTED, lw=1.6, label="slowest, fastest round")]
    rows += [heading(" "), Line2D([], [], color=INK, lw=1.3, label="frontier: none is both")]
    rows.append(heading("cheaper and better,"))
    rows.append(heading("beyond errors"))
    legend = figure.legend(handles=rows, loc="outside right center", fontsize=9, labelspacing=0.42)
    for text in legend.get_texts():
        if text.get_text().split(":")[0] in ("Depth", "Size", "Shape"):
            text.set_fontweight("bold")


def write_frontier_png(sweep: Sweep, path: str | Path) -> None:
    """Draw `frontier_figure` into a PNG of twice the screen's resolution, all or nothing."""
    figure = frontier_figure(sweep)
    buffer = io.BytesIO()
    with drawing_style():
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    write_bytes(Path(path), buffer.getvalue())
