"""The drawings: they draw whatever a sweep holds, cover no label, and leave no settings behind."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest

from elastic_moe.lab.schema import full_values
from elastic_moe.lab.view.frontier import (
    curves,
    decode_time,
    format_value,
    frontier,
    full_point,
)
from elastic_moe.lab.view.frontier_plot import frontier_figure, write_frontier_png
from elastic_moe.lab.view.report_plots import curve_figure, expert_use_figure
from elastic_moe.lab.view.style import figure_to_svg
from elastic_moe.routing.axes import TRAINED
from tests.lab.view.synthetic import synthetic_sweep


def label_boxes(figure):
    figure.draw_without_rendering()
    return [
        [(t.get_text(), t.get_window_extent()) for t in axes.texts if t.get_gid() == "label"]
        for axes in figure.axes
    ]


PNG = b"\x89PNG\r\n\x1a\n"


def points_drawn(axes):
    """Which points of the sweep have a dot here."""
    gids = [line.get_gid() or "" for line in axes.lines]
    return sorted(int(gid.removeprefix("point-")) for gid in gids if gid.startswith("point-"))


def assert_is_svg(text):
    assert ElementTree.fromstring(text).tag.endswith("svg")


def test_both_panels_name_their_own_frontier_without_overlaps():
    sweep = synthetic_sweep()
    figure = frontier_figure(sweep)
    assert len(figure.axes) == 2
    expected = [frontier(sweep["points"], decode_time), frontier(sweep["points"])]
    for axes, boxes, edge in zip(figure.axes, label_boxes(figure), expected, strict=True):
        names = {name for name, _ in boxes}
        assert names <= {p["name"] for p in edge}
        assert len(names) >= 0.8 * len(edge)
        frame = axes.get_window_extent()
        for i, (_, box) in enumerate(boxes):
            assert frame.x0 <= box.x0
            assert box.x1 <= frame.x1
            assert frame.y0 <= box.y0
            assert box.y1 <= frame.y1
            assert not any(box.overlaps(other) for _, other in boxes[:i])


def with_spread(sweep):
    for point in sweep["points"]:
        for kind in ("prefill", "decode"):
            key = f"{kind}_tokens_per_second"
            point[f"{key}_min"], point[f"{key}_max"] = 0.97 * point[key], 1.02 * point[key]
    return sweep


def test_speeds_are_drawn_with_their_slowest_and_fastest_round():
    sweep = with_spread(synthetic_sweep())
    speed, cost = frontier_figure(sweep).axes
    bars = [line.get_xdata() for line in speed.lines if line.get_gid() == "spread"]
    ends = [sorted(bar) for bar in bars]
    assert ends == [
        pytest.approx(sorted(p[f"decode_tokens_per_second_{end}"] for end in ("min", "max")))
        for p in sweep["points"]
    ]
    assert not [line for line in cost.lines if line.get_gid() == "spread"]
    _, bottom = curve_figure(sweep, "depth").axes
    assert len([line for line in bottom.lines if line.get_gid() == "spread"]) == 4
    assert len(bottom.get_legend().get_texts()) == 2


def test_a_busy_machine_is_named_in_the_title():
    def texts(sweep):
        return " ".join(text.get_text() for text in frontier_figure(sweep).texts)

    sweep = synthetic_sweep()
    assert "busy" not in texts(sweep)
    load = {"other_threads_mean": 3.0, "other_threads_max": 5, "busy": True}
    assert "the machine was busy" in texts(sweep | {"load": load})


def test_quality_points_up_in_both_panels():
    for axes in frontier_figure(synthetic_sweep()).axes:
        assert axes.yaxis.get_inverted()
        assert "better" in axes.get_xlabel()


def test_every_point_is_drawn_once_in_each_panel():
    sweep = synthetic_sweep()
    for axes in frontier_figure(sweep).axes:
        assert points_drawn(axes) == list(range(len(sweep["points"])))


def test_untrained_points_are_hollow():
    sweep = synthetic_sweep()
    axes = frontier_figure(sweep, "flops").axes[0]
    for line in axes.lines:
        if (gid := line.get_gid() or "").startswith("point-"):
            trained = sweep["points"][int(gid.removeprefix("point-"))]["trained"]
            assert (line.get_markerfacecolor() == line.get_markeredgecolor()) is False
            assert (line.get_markeredgewidth() < 1) is trained


def test_without_timings_only_the_flops_are_drawn():
    figure = frontier_figure(synthetic_sweep(timings=False))
    assert [axes.get_xlabel()[:5] for axes in figure.axes] == ["MFLOP"]


@pytest.mark.parametrize(("count", "timings"), [(0, True), (1, True), (2, False), (7, True)])
def test_a_partial_sweep_draws_the_points_that_it_has(tmp_path, count, timings):
    sweep = synthetic_sweep(timings=timings, complete=False)
    sweep["points"] = sweep["points"][:count]
    sweep["expert_use"] = None
    write_frontier_png(sweep, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
    for axes in frontier_figure(sweep).axes:
        assert points_drawn(axes) == list(range(count))
    for axis in TRAINED:
        figure = curve_figure(sweep, axis)
        full = full_point(sweep["points"]) or full_values(sweep["model"])
        values = [format_value(p[axis.name]) for p in curves(sweep["points"], full)[axis.name]]
        ticks = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
        assert ticks == values or not count  # without points the axis keeps its own ticks
        assert_is_svg(figure_to_svg(figure))
    assert_is_svg(figure_to_svg(expert_use_figure(sweep)))


def test_without_the_full_network_all_other_points_are_drawn(tmp_path):
    sweep = synthetic_sweep(complete=False)
    del sweep["points"][0]
    write_frontier_png(sweep, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
    for axes in frontier_figure(sweep).axes:
        assert points_drawn(axes) == list(range(len(sweep["points"])))
    for axis in TRAINED:
        assert_is_svg(figure_to_svg(curve_figure(sweep, axis.name)))


def test_some_points_untimed_and_a_wide_range(tmp_path):
    sweep = synthetic_sweep()
    for point in sweep["points"][::3]:
        point["decode_tokens_per_second"] = None
    sweep["points"][1]["decode_tokens_per_second"] = 90_000.0
    sweep["points"][1]["flops_per_token"] = 1e3
    assert [axes.get_xscale() for axes in frontier_figure(sweep).axes] == ["log", "log"]
    write_frontier_png(sweep, tmp_path / "frontier.png")


@pytest.mark.parametrize("name", ["$x^{$", "a$b$c", "模型 👾", "nul\0 \ud800", "<script>&"])
def test_odd_names_are_drawn_as_they_are(tmp_path, name):
    sweep = synthetic_sweep()
    sweep["model"]["name"] = sweep["corpus"]["name"] = sweep["machine"]["cpu"] = name
    for point in sweep["points"]:
        point["name"] += name if point["name"] != "full" else ""
    write_frontier_png(sweep, tmp_path / "frontier.png")
    assert "<script" not in figure_to_svg(frontier_figure(sweep))


def test_curves_show_two_standard_errors_and_their_cost():
    sweep = synthetic_sweep()
    top, bottom = curve_figure(sweep, "top_k").axes
    bars = top.containers[0][2][0].get_segments()
    k1 = next(p for p in sweep["points"] if p["name"] == "k1")
    assert bars[0][1][1] - bars[0][0][1] == pytest.approx(4 * k1["standard_error"])
    assert "2 paired standard errors" in top.get_title(loc="right")
    assert [line.get_label() for line in bottom.lines] == [
        "FLOPs per token",
        "decode time, measured",
    ]


def test_png_has_twice_the_resolution_and_repeats(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    write_frontier_png(synthetic_sweep(), first)
    write_frontier_png(synthetic_sweep(), second)
    data = first.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data == second.read_bytes()
    assert int.from_bytes(data[16:20]) == 2280
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_point_without_one_value_per_axis_draws(tmp_path):
    """As where no active layer routes, or layers differ."""
    sweep = synthetic_sweep()
    sweep["points"][3] |= {"name": "x0badcafe", "top_k": None, "expert_pool": None}
    write_frontier_png(sweep, tmp_path / "frontier.png")
    for axis in TRAINED:
        assert "x0badcafe" not in figure_to_svg(curve_figure(sweep, axis))


def test_settings_of_the_process_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    figure_to_svg(frontier_figure(synthetic_sweep()))
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
    code = (
        "import sys, elastic_moe.lab.view.frontier_plot, elastic_moe.lab.view.report\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
