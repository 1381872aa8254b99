"""The plot of a training run: its loss, of full-network steps and of reduced ones.

Drawn with matplotlib's objects, as `frontier_plot`: no pyplot, no global state kept.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from elastic_moe.errors import TrainingError
from elastic_moe.files import write_bytes
from elastic_moe.lab.view.frontier import clean, format_si
from elastic_moe.lab.view.style import BLUE, INK, MUTED, VERMILION, drawing_style
from elastic_moe.train.models import config_from_json
from elastic_moe.train.runs.log import read_log, split_records
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.step.state import STATE, load_state

Record = dict[str, Any]
Numbers = NDArray[np.float64]
_UNITS = ((9, "billion"), (6, "million"), (3, "thousand"))
_SPAN = 0.04  # of the steps drawn: what a point of a line is the mean of
_STEEP = 0.05  # of the steps: the first fall, which would leave no height for the rest
_LEAST_STEPS = 200  # of a run that has more than its first fall


def loss_figure(
    full: Sequence[Record], reduced: Sequence[Record], total_tokens: int, title: str, note: str = ""
) -> Figure:
    """Loss against tokens: a dot per pass, a line for their running mean; learning rate below.

    Args:
        full, reduced: records of passes that ran the whole network, or less of it.
        total_tokens: of the whole plan, so that a run that is not done shows what is to come.
        title, note: what was trained, and how.
    """
    records = sorted([*full, *reduced], key=lambda r: r["step"])
    with drawing_style():
        figure = Figure(figsize=(8.6, 5.2), layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        size = 9.0 if len(records) < 300 else 4.0 if len(records) < 3000 else 1.5
        _draw(top, reduced, VERMILION, "reduced networks", size)
        _draw(top, full, BLUE, "full network", size)
        handles, labels = top.get_legend_handles_labels()
        if handles:  # the full network first
            top.legend(handles[::-1], labels[::-1], loc="upper right", fontsize=10)
            _limit(top, records)
        else:
            top.text(0.5, 0.5, "no step yet", transform=top.transAxes, ha="center")
        top.set_ylabel("loss, nats per token")
        top.set_xlim(0, total_tokens)
        _draw_rate(bottom, records)
        exponent, unit = next((u for u in _UNITS if total_tokens >= 10 ** u[0]), (0, ""))
        bottom.set_xlabel(f"{unit} tokens read".strip())
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 10**exponent:,.10g}"))
        figure.suptitle(clean(title, 80) + "\n", x=0.012, ha="left", size=13, weight="bold")
        figure.text(0.012, 0.938, clean(note, 120), color=MUTED, size=10, va="top")
        return figure


def _draw(axes: Axes, records: Sequence[Record], colour: str, name: str, size: float) -> None:
    """Dots and their running mean; the legend says where it ends."""
    if not records:
        return
    x: Numbers = np.array([r["tokens"] for r in records], dtype=float)
    y: Numbers = np.array([r["loss"] for r in records], dtype=float)
    axes.scatter(x, y, s=size, color=colour, alpha=0.35, linewidths=0, gid=f"steps {name}")
    line = running_mean(y)
    axes.plot(x, line, color=colour, lw=1.8, label=f"{name}: {line[-1]:.2f} at the end", gid=name)


def _limit(axes: Axes, records: Sequence[Record]) -> None:
    """All losses, or those after the first fall, which the plot then states in words."""
    losses: Numbers = np.array([r["loss"] for r in records], dtype=float)
    low, high = float(losses.min()), float(losses.max())
    if len(losses) >= _LEAST_STEPS:
        later = float(losses[round(len(losses) * _STEEP) :].max())
        if losses[0] > later + 0.25 * (later - low):
            high = later
            axes.text(
                0.17,
                0.985,
                f"↖ from {losses[0]:.2f} in the first step",
                transform=axes.transAxes,
                color=MUTED,
                size=9,
                va="top",
                gid="first",
            )
    margin = 0.05 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - margin), high + margin)


def _draw_rate(axes: Axes, records: Sequence[Record]) -> None:
    x = [r["tokens"] for r in records]
    y = [r["lr_scale"] for r in records]
    axes.plot(x, y, color=INK, lw=1.2, gid="rate")
    axes.fill_between(x, y, color=MUTED, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 1], ["0", "peak"])
    axes.set_ylabel("learning\nrate")


def running_mean(values: Numbers) -> Numbers:
    """At each value the mean of those around it: a twenty-fifth of all, or seven; fewer at first.

    It begins as the values do, where they fall steeply, and ends as the mean of the last.
    """
    count = len(values)
    index = np.arange(count)
    half = np.minimum(index // 6, max(3, round(count * _SPAN / 2)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    starts, ends = index - half, np.minimum(index + half + 1, count)
    means: Numbers = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def write_loss_png(run: Path, path: Path) -> None:
    """Draw the run of a folder into a PNG of twice the screen's resolution, all or nothing.

    Raises:
        TrainingError: the folder holds no run.
    """
    figure = figure_of_run(run)
    buffer = io.BytesIO()
    with drawing_style():
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def figure_of_run(run: Path) -> Figure:
    """The figure of a run's folder, as far as the run got.

    Raises:
        TrainingError: the folder holds no run.
    """
    state = run / STATE
    if not state.is_file():
        raise TrainingError(f"{state} is missing. Name the folder that --out named in training.")
    _, progress = load_state(state)
    plan, config = TrainingPlan.from_json(progress["plan"]), config_from_json(progress["model"])
    full, reduced = split_records(read_log(run), plan, config.shape)
    tokens = sum(stage.steps * stage.step_tokens for stage in plan.stages)
    steps = progress["step"]
    state_of_run = "" if steps == plan.total_steps else f" of {plan.total_steps:,}"
    share = f", {len(reduced) / max(1, steps):.0%} of them reduced" if reduced else ""
    if plan.sandwich:
        share = ", each of the full network and two reduced ones"
    elif plan.split:
        share = ", each of the full network and a reduced one"
    note = (
        f"{config.num_layers} layers, {config.num_experts} experts, {config.max_top_k} per token, "
        f"{format_si(config.shape.total_params)} parameters; {steps:,}{state_of_run} steps{share}"
    )
    return loss_figure(full, reduced, tokens, f"Training of {run.resolve().name}", note)
