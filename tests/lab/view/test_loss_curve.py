"""The picture of a run tells full-network steps from reduced ones, whatever the run has got to."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from elastic_moe.errors import TrainingError
from elastic_moe.lab.view.loss_curve import figure_of_run, loss_figure, running_mean, write_loss_png
from elastic_moe.lab.view.style import BLUE, VERMILION, figure_to_svg
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.step.plan import parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from tests.train.tiny import PLAN, trainer

PNG = b"\x89PNG\r\n\x1a\n"


def records(steps: int, first: int = 1, every: int = 1, lift: float = 0.0) -> list[dict[str, Any]]:
    """A loss that falls from 9 towards 3, as it does."""
    return [
        {
            "step": step,
            "tokens": 1000 * step,
            "loss": 3 + lift + 6 * float(np.exp(-step / 20)),
            "lr_scale": min(1.0, step / 10),
        }
        for step in range(first, steps + 1, every)
    ]


def drawn(figure: matplotlib.figure.Figure) -> dict[str, Any]:
    """What carries a name in the upper panel."""
    axes = figure.axes[0]
    return {item.get_gid(): item for item in [*axes.lines, *axes.collections, *axes.texts]}


def test_every_step_is_a_dot_of_its_kind_with_a_line_through_them() -> None:
    full, reduced = records(60, 1, 2), records(60, 2, 2, lift=0.5)
    items = drawn(loss_figure(full, reduced, 100_000, "title"))
    for name, own, colour in (
        ("full network", full, BLUE),
        ("reduced networks", reduced, VERMILION),
    ):
        dots = np.asarray(items[f"steps {name}"].get_offsets())
        assert dots.tolist() == [[r["tokens"], r["loss"]] for r in own]
        assert items[name].get_color() == colour
        assert len(items[name].get_xdata()) == len(own)
    legend = [text.get_text() for text in items["full network"].axes.get_legend().get_texts()]
    assert [label.split(":")[0] for label in legend] == ["full network", "reduced networks"]
    ends = [float(label.split()[-4]) for label in legend]
    assert ends[1] - ends[0] == pytest.approx(0.5, abs=0.1)


def test_the_axis_reaches_to_the_end_of_the_plan_and_the_rate_is_below() -> None:
    top, bottom = loss_figure(records(60), [], 100_000, "title").axes
    assert top.get_xlim() == bottom.get_xlim() == (0, 100_000)
    assert bottom.get_xlabel() == "thousand tokens read"
    assert bottom.xaxis.get_major_formatter()(50_000, 0) == "50"
    (rate,) = [line for line in bottom.lines if line.get_gid() == "rate"]
    assert rate.get_ydata().tolist()[:3] == [0.1, 0.2, 0.3]
    assert loss_figure([], [], 3_000_000, "t").axes[1].get_xlabel() == "million tokens read"


def test_the_first_fall_of_a_long_run_is_told_in_words() -> None:
    axes = loss_figure(records(1000), [], 10**6, "title").axes[0]
    assert axes.get_ylim()[1] < 4
    assert drawn(axes.figure)["first"].get_text() == "↖ from 8.71 in the first step"
    short = loss_figure(records(60), [], 10**6, "title")
    assert short.axes[0].get_ylim()[1] > 8.7
    assert "first" not in drawn(short)
    flat = [{**r, "loss": 3.0} for r in records(1000)]  # as of a checkpoint that is trained on
    assert "first" not in drawn(loss_figure(flat, [], 10**6, "title"))


def test_the_line_begins_as_the_losses_do_and_ends_as_the_mean_of_the_last() -> None:
    values = np.array([9.0, 8.0, 7.0, *([5.0] * 193), 1.0, 2.0, 3.0, 6.0])
    line = running_mean(values)
    assert line[:3].tolist() == [9.0, 8.0, 7.0]
    assert line[100] == 5.0
    assert line[-1] == pytest.approx(values[-5:].mean())
    assert running_mean(np.array([4.0])).tolist() == [4.0]


@pytest.mark.parametrize(("steps", "kind"), [(0, "none"), (3, "subset"), (14, "all")])
def test_a_run_is_drawn_as_far_as_it_got(steps: int, kind: str, tmp_path: Path) -> None:
    it = trainer()
    for _ in range(steps):
        it.train_step()
    it.save(tmp_path / "state.safetensors")
    run_steps(trainer(), tmp_path, max_seconds=0 if kind != "all" else 60)
    log = [
        {**r, "layers": it.plan.stage(r["step"] - 1).layers}
        | {"subnet": it.plan.subnet(it.config.shape, r["step"] - 1).name}
        for r in records(steps)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    write_loss_png(tmp_path, tmp_path / "loss.png")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(PNG)
    assert int.from_bytes(data[16:20]) == 1720
    svg = figure_to_svg(figure_of_run(tmp_path))
    assert f"{steps} steps" in svg or f"{steps} of 14 steps" in svg
    assert ("no step yet" in svg) is (steps == 0)
    write_loss_png(tmp_path, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == data


def test_the_full_network_of_every_stage_is_told_from_reduced_ones(tmp_path: Path) -> None:
    stages = parse_stages("2x10x1x128,6x10x1x128")
    it = trainer(replace(PLAN, stages=stages, sampling=SamplingPlan(full=0.5)))
    run_steps(it, tmp_path)
    dots = {
        name: len(item.get_offsets())
        for name, item in drawn(figure_of_run(tmp_path)).items()
        if (name or "").startswith("steps ")
    }
    full = sum(
        it.plan.subnet(it.config.shape, s) == it.plan.whole(it.config.shape, s) for s in range(20)
    )
    assert dots == {"steps full network": full, "steps reduced networks": 20 - full}
    assert 0 < full < 20


def test_every_pass_of_a_sandwich_is_drawn(tmp_path: Path) -> None:
    it = trainer(replace(PLAN, sampling=SamplingPlan(), sandwich=True))
    run_steps(it, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    figure = figure_of_run(tmp_path)
    items = drawn(figure)
    full = items["steps full network"].get_offsets().tolist()
    reduced = items["steps reduced networks"].get_offsets().tolist()
    assert full == [[r["tokens"], r["loss"]] for r in log]
    assert reduced == [[r["tokens"], loss] for r in log for loss in r["sandwich_loss"]]
    assert len(reduced) == 2 * len(log) == 28
    assert "14 steps, each of the full network and two reduced ones" in figure_to_svg(figure)
    old = [{k: v for k, v in r.items() if k != "sandwich_loss"} for r in log]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert "steps reduced networks" not in drawn(figure_of_run(tmp_path))


def test_both_networks_of_a_split_step_are_drawn(tmp_path: Path) -> None:
    run_steps(trainer(replace(PLAN, sampling=SamplingPlan(), split=0.5)), tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    figure = figure_of_run(tmp_path)
    full, reduced = (
        drawn(figure)[f"steps {kind}"].get_offsets().tolist()
        for kind in ("full network", "reduced networks")
    )
    assert full == [[r["tokens"], r["loss"]] for r in log]
    assert reduced == [[r["tokens"], *r["split_loss"]] for r in log]
    assert "14 steps, each of the full network and a reduced one" in figure_to_svg(figure)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is missing"):
        write_loss_png(tmp_path, tmp_path / "loss.png")


def test_pyplot_is_never_imported_and_settings_stay() -> None:
    before = dict(matplotlib.rcParams)
    loss_figure(records(60), [], 10**6, "title $x^{$ \0")
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, elastic_moe.lab.view.loss_curve\nsys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
