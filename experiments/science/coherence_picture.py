"""The picture of the coherence benchmark: loss by position, and how soon answers differ."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from elastic_moe.files import write_bytes
from elastic_moe.lab.view.style import (
    BLUE,
    INK,
    MUTED,
    PAPER,
    VERMILION,
    depth_colours,
    drawing_style,
)

PURPLE = "#cc79a7"  # Okabe and Ito's, as blue and vermilion are
LEAST_SPAN = 0.01  # nats of an axis
MERGED = 2  # bins that are drawn as one: less noise of what the text happens to be
Line = Mapping[str, Any]
Numbers = NDArray[Any]


def coherence_figure(line: Line) -> Figure:
    """Loss by position on every text, and the share of answers that are still the full network's.

    Args:
        line: of `coherence.jsonl`.
    """
    texts = list(line["positions"])
    styles = _styles(list(_networks(line)))
    with drawing_style():
        figure = Figure(figsize=(12.6, 6.2), layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(5, len(texts) + 1)
        for column, text in enumerate(texts):
            top = figure.add_subplot(grid[:2, column])
            bottom = figure.add_subplot(grid[2:, column], sharex=top)
            _draw_full(top, line, text)
            _draw_lost(bottom, line, text, styles)
            if column == 0:
                top.set_ylabel("full network,\nnats per token")
                bottom.set_ylabel("nats lost against the full network\n(lower is worse)")
        _draw_divergence(figure.add_subplot(grid[:, -1]), line, styles)
        firsts = {n: w["divergence"]["first_difference"] for n, w in _networks(line).items()}
        figure.legend(
            [Line2D([], [], **style) for style in styles.values()],
            ["full" if name == "full" else f"{name}: {firsts[name]:.1f}" for name in styles],
            loc="outside lower center",
            ncols=len(styles),
            fontsize=9,
            handlelength=2.4,
            columnspacing=1.6,
        )
        figure.suptitle(
            f"{line['case']}: what reduced networks lose along a long context, and how soon they "
            f"write something else\n",
            x=0.012,
            ha="left",
            size=13,
            weight="bold",
        )
        windows = next(iter(line["texts"].values()))["windows"]
        figure.text(
            0.012,
            0.945,
            f"{windows} windows of {line['position_edges'][-1]:,} tokens of each text; "
            f"{len(line['writing']['full']['divergence']['first_differences'])} prompts of "
            f"{line['prompt_tokens']} tokens, {line['new_tokens']} written; {line['dtype']}",
            color=MUTED,
            size=10,
            va="top",
        )
        return figure


def _networks(line: Line) -> dict[str, Any]:
    """What each network wrote, the full one first."""
    found = {name: written for name, written in line["writing"].items() if name != "human"}
    return {"full": found.pop("full"), **found}


def _draw_full(axes: Axes, line: Line, text: str) -> None:
    """The full network's own loss, and what the last tokens cost it with a short context."""
    edges = np.array(line["position_edges"])
    measured, short = line["positions"][text]["full"], line["trained_length"]
    nats = np.array(measured["nats"])
    axes.plot(*_merged(edges, nats), color=INK, lw=2.0)
    ends = [edges[-1] - short, edges[-1]]
    long = float(nats[edges[:-1] >= ends[0]].mean())
    near = long - measured["long_context"]["nats"]
    axes.plot(ends, [long, long], color=INK, lw=1.2, ls=(0, (2, 1)))
    axes.plot(ends, [near, near], color=BLUE, lw=1.8, ls=(0, (2, 1)))
    axes.text(
        0.985,
        0.97,
        f"dashes: the last {short} as a whole, and (blue)\n"
        f"with {short // 2} to {short - 1} tokens of context alone",
        transform=axes.transAxes,
        color=MUTED,
        size=8.5,
        ha="right",
        va="top",
    )
    axes.set_title(text.replace("-", " "), loc="left", size=10.5)
    axes.tick_params(labelbottom=False)
    low, high = float(nats.min()), float(nats.max())
    span = max(high - low, LEAST_SPAN)
    axes.set_ylim(high + 0.05 * span, low - 0.3 * span)
    _mark_trained(axes, line, label=False)


def _draw_lost(axes: Axes, line: Line, text: str, styles: Mapping[str, dict[str, Any]]) -> None:
    edges = np.array(line["position_edges"])
    low = high = 0.0  # where nothing is lost, something may be gained, or neither
    for name, style in styles.items():
        lost = np.array(line["positions"][text][name]["lost"])
        axes.plot(*_merged(edges, lost), **style)
        low, high = min(low, float(lost.min())), max(high, float(lost.max()))
    span = max(high - low, LEAST_SPAN)
    axes.set_ylim(high + 0.1 * span, low - 0.05 * span)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v == 0 else f"{v:+.1f}"))
    axes.set_xlabel("position: tokens of context")
    _mark_trained(axes, line, label=True)


def _merged(edges: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """Middles and means of two bins at a time, each of as many tokens."""
    edges = edges[::MERGED]
    return (edges[:-1] + edges[1:]) / 2, values.reshape(-1, MERGED).mean(axis=1)


def _mark_trained(axes: Axes, line: Line, *, label: bool) -> None:
    trained, end = line["trained_length"], line["position_edges"][-1]
    axes.axvspan(trained, end, color=MUTED, alpha=0.07, lw=0, zorder=0)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(FixedLocator(list(range(0, end + 1, trained))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    if label:
        axes.text(
            end - 25,
            0.02,
            f"beyond the {trained} tokens that it was trained on",
            transform=axes.get_xaxis_transform(),
            color=MUTED,
            size=9,
            ha="right",
            va="bottom",
        )


def _draw_divergence(axes: Axes, line: Line, styles: Mapping[str, dict[str, Any]]) -> None:
    length = line["new_tokens"]
    counts = np.arange(1, length + 1)
    for name, style in styles.items():
        if name == "full":
            continue
        firsts = np.array(line["writing"][name]["divergence"]["first_differences"])
        same = [(firsts >= n).mean() for n in counts]
        axes.plot(counts, same, drawstyle="steps-mid", **style)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, length)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(FixedLocator([2**i for i in range(length.bit_length())]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    axes.set_xlabel("tokens written, greedily")
    axes.set_title("answers that are still the full network's", loc="left", size=10.5)
    axes.text(
        0.985,
        0.985,
        "in the legend: mean index of\nthe first token that differs",
        transform=axes.transAxes,
        color=MUTED,
        size=9,
        ha="right",
        va="top",
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
    )


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Depth by viridis as in the frontier, whole lines; other axes dashed; several dotted."""
    depths = {name: int(name[1:]) for name in names if name[0] == "L" and name[1:].isdigit()}
    colours = depth_colours([*depths.values(), 1 + max(depths.values(), default=1)])
    deepest = max(colours)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "full":
            look: dict[str, Any] = {"color": INK, "lw": 2.2, "zorder": 4}
        elif name in depths:
            look = {"color": colours[depths[name]] if depths[name] < deepest else INK, "lw": 1.7}
        elif "-" in name:
            look = {"color": MUTED, "lw": 1.7, "ls": (0, (1, 1.3))}
        else:
            colour = {"k": BLUE, "w": VERMILION, "p": PURPLE}.get(name[0], MUTED)
            look = {"color": colour, "lw": 1.5, "ls": (0, (5, 1.8))}
            if name.endswith("1"):
                look["ls"] = (0, (2.2, 1.6))
        found[name] = look
    return found


def write_picture(line: Line, path: Path) -> None:
    """Draw `coherence_figure` into a PNG of twice the screen's resolution, all or nothing."""
    figure = coherence_figure(line)
    buffer = io.BytesIO()
    with drawing_style():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
