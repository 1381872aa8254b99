"""The smaller plots of the report: a curve per axis, and the share of each expert."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from elastic_moe.lab.schema import full_values, with_every_field
from elastic_moe.lab.view.frontier import (
    Sweep,
    curves,
    decode_time,
    decode_time_range,
    finite,
    flops,
    format_value,
    full_point,
    use_layers,
)
from elastic_moe.lab.view.style import (
    BLUE,
    INK,
    MUTED,
    PAPER,
    VERMILION,
    drawing_style,
)
from elastic_moe.routing.axes import TRAINED, Axis


def curve_figure(sweep: Sweep, axis: str | Axis) -> Figure:
    """One axis alone, the rest full: the loss it costs, and below it what it saves.

    Args:
        sweep: the content of `sweep.json`.
        axis: one of `TRAINED`, or its key.
    """
    axis = axis if isinstance(axis, Axis) else next(a for a in TRAINED if a.name == axis)
    sweep = with_every_field(sweep)
    full = full_point(sweep["points"])
    members = curves(sweep["points"], full or full_values(sweep["model"]))[axis.name]
    x = [float(p[axis.name]) for p in members]
    with drawing_style():
        figure = Figure(figsize=(4.6, 4.4), layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        bottom.set_xlabel(f"{axis.title.lower()}: {axis.unit}")
        top.set_ylabel("nats/token against full\n(up is better)")
        bottom.set_ylabel("% of full")
        if not members:
            top.text(0.5, 0.5, "nothing measured yet", transform=top.transAxes, ha="center")
            return figure
        top.axhline(0, color=MUTED, lw=1, ls=(0, (4, 3)))
        delta = [-float(p["delta_nats"]) for p in members]
        known = any(finite(p["standard_error"]) is not None for p in members)
        error = [2 * (finite(p["standard_error"]) or 0.0) for p in members] if known else None
        top.errorbar(
            x,
            delta,
            yerr=error,
            color=BLUE,
            ecolor=INK,
            capsize=4,
            elinewidth=1.2,
            lw=1.6,
            zorder=3,
        )
        for point, at, value in zip(members, x, delta, strict=True):
            filled = point.get("trained", True)
            top.plot([at], [value], "o", color=BLUE, ms=6, mfc=BLUE if filled else PAPER, zorder=4)
        top.margins(x=0.07, y=0.12)
        top.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ticks = top.get_yticks()
        digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
        # Losses are drawn downwards but written as what they are: "+0.05" is worse.
        top.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{-v:+.{digits}f}" if abs(v) > 1e-12 else "0")
        )
        bars = "bars: ± 2 paired standard errors" if known else "one window: no standard error"
        top.set_title(bars, size=9, color=MUTED, loc="right")

        series = (
            ("FLOPs per token", flops, VERMILION, "s-"),
            ("decode time, measured", decode_time, INK, "^--"),
        )
        for label, cost, colour, style in series:
            base = cost(full) if full is not None else None
            pairs = [(at, 100 * c / base) for p, at in zip(members, x, strict=True)
                     if base and (c := cost(p)) is not None]  # fmt: skip
            if pairs:
                bottom.plot(*zip(*pairs, strict=True), style, color=colour, ms=5, label=label)
        base = decode_time(full) if full is not None else None
        for point, at in zip(members, x, strict=True):
            if base and (ends := decode_time_range(point)):
                bottom.plot([at, at], [100 * end / base for end in ends], color=INK, gid="spread")
        bottom.set_ylim(bottom=0, top=max(108.0, bottom.get_ylim()[1]))
        if bottom.lines:
            bottom.legend(loc="lower right" if axis.size else "lower left", fontsize=9)
        bottom.set_xticks(x, [format_value(p[axis.name]) for p in members])
        return figure


def expert_use_figure(sweep: Sweep) -> Figure:
    """Which experts the routers choose: layers that route across, experts down, 1 = an even share.

    A cross marks an expert that was never chosen.
    """
    ids, layers = use_layers(sweep)
    rows = np.asarray(layers or [[0.0]], dtype=np.float64)
    totals = rows.sum(axis=1, keepdims=True)
    share = rows * rows.shape[1] / np.where(totals > 0, totals, 1.0)  # (L, E), mean 1
    with drawing_style():
        height = min(7.0, max(2.6, 1.2 + 0.125 * share.shape[1]))
        figure = Figure(figsize=(10.0, height), layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        # log2, so that half and double are equally far from an even share.
        image = axes.imshow(
            np.log2(np.clip(share.T, 2.0**-3, 2.0**3)),
            norm=TwoSlopeNorm(0.0, -3.0, 3.0),
            cmap="PuOr_r",
            aspect="auto",
            interpolation="none",
        )
        never_layers, never_experts = np.nonzero((share == 0) & (totals > 0))
        axes.plot(never_layers, never_experts, "x", color="white", ms=4, mew=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: str(ids[int(x)]) if 0 <= x < len(ids) else "")
        )
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layer")
        axes.set_ylabel("expert")
        bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04, ticks=range(-3, 4))
        bar.ax.set_yticklabels(["≤ 1/8", "1/4", "half", "even", "double", "4 x", "≥ 8 x"])
        bar.outline.set_visible(False)
        bar.set_label("share of the choices")
        return figure
