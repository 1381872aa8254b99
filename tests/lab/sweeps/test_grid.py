"""Grids hold the points that were asked for, and say why others are missing."""

from __future__ import annotations

import dataclasses
import math

import pytest

from elastic_moe.engine import Engine
from elastic_moe.errors import RoutingError
from elastic_moe.lab.sweeps.grid import (
    check_values,
    default_grid,
    groups,
    is_trained,
    product_grid,
)
from elastic_moe.model.config import ElasticBlock
from elastic_moe.routing import parse_name
from elastic_moe.routing.axes import AXES, Axis
from elastic_moe.train.models import ELASTIC_MINI

SHAPE = ELASTIC_MINI.shape


def test_the_default_grid_crosses_depth_and_top_k_and_tries_each_other_axis_alone(
    mini: Engine,
) -> None:
    names = {subnet.name for subnet in default_grid(SHAPE, mini.config.elastic).subnets}
    assert names >= {"full", "L12", "L24-k1", "L36-k2", "k3", "w2", "w4", "w6", "p4", "p8", "p12"}
    assert names >= {"t0.25", "t0.5", "t0.75", "t1"}
    assert len(names) == 16 + 3 + 4 + 3


def test_width_and_pool_stay_out_of_the_default_where_they_were_not_trained() -> None:
    names = {subnet.name for subnet in default_grid(SHAPE, None).subnets}
    assert not any("w" in name or "p" in name for name in names)
    assert "L12-k1" in names
    assert "t0.5" in names


def test_quarters_of_the_pool_that_top_k_exceeds_are_listed() -> None:
    shape = dataclasses.replace(SHAPE, num_experts=8, max_top_k=4)
    elastic = ElasticBlock(width_granules=8, trained={"pool": (4, 8)})
    grid = default_grid(shape, elastic)
    assert {"p4", "p6"} <= {subnet.name for subnet in grid.subnets}
    (skipped,) = grid.skipped
    assert skipped["name"] == "p2"
    assert "top_k must be an integer in [1, 2], got 4" in skipped["reason"]


def test_given_values_are_combined_and_impossible_points_are_listed() -> None:
    grid = product_grid(SHAPE, {"depth": [12, 60], "top_k": [1, 4], "expert_pool": [2, 16]})
    assert [subnet.name for subnet in grid.subnets] == ["full", "L12-k1-p2", "L12-k1", "L12"]
    reasons = {entry["name"]: entry["reason"] for entry in grid.skipped}
    assert "depth must be an integer in [1, 48], got 60" in reasons["L60-k1-p2"]
    assert "top_k must be an integer in [1, 2], got 4" in reasons["L12-k4-p2"]
    assert len(reasons) == 5


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_of_every_axis_values_out_of_range_are_refused_and_others_are_not(axis: Axis) -> None:
    most = axis.most(SHAPE)
    check_values(SHAPE, {axis.name: [most, most if axis.above_zero else axis.least]})
    beyond = [most + 1, axis.least - 1, -most, math.nan, True, "1", *[1.5] * (axis.kind != "real")]
    for value in [*beyond, *[0.0] * axis.above_zero]:
        with pytest.raises(RoutingError, match=f"^{axis.wire} must be .* got {value!r}\\. Nothing"):
            check_values(SHAPE, {axis.name: [most, value]})


def test_all_wrong_values_are_named_at_once() -> None:
    check_values(SHAPE, {"depth": [1, 48], "expert_pool": [2]})  # top-k 4 needs more: one point
    with pytest.raises(RoutingError, match=r"\[1, 48\], got 49, 60; .*top_k .*\[1, 4\], got 0"):
        check_values(SHAPE, {"depth": [12, 49, 60], "top_k": [0, 1]})


def test_lists_of_members_and_of_layers_are_checked_too() -> None:
    check_values(SHAPE, {"active_layers": [[0, 47]], "expert_pool": [[0, 15]], "top_k": [[2] * 48]})
    for key, value in (("active_layers", [48]), ("expert_pool", [16]), ("top_k", [5] * 48)):
        with pytest.raises(RoutingError, match=key):
            check_values(SHAPE, {key: [value]})


def test_prefixes_are_bundled_and_the_full_network_comes_first() -> None:
    names = ["L12-k1", "L12", "full", "k1", "w4", "L24", "Lx5", "L24-w4", "L2-t0.5"]
    bundles = groups([parse_name(SHAPE, name) for name in names])
    spelled = [(deepest.name, sorted(s.name for s in members)) for deepest, members in bundles]
    assert spelled[0] == ("full", ["L12", "L24", "full"])
    assert sorted(spelled[1:]) == [
        ("L2-t0.5", ["L2-t0.5"]),
        ("Lx5", ["Lx5"]),
        ("k1", ["L12-k1", "k1"]),
        ("w4", ["L24-w4", "w4"]),
    ]


def test_trained_means_every_value_was_drawn_in_training(tiny: Engine) -> None:
    elastic = tiny.config.elastic
    trained = {
        name: is_trained(tiny.resolve(name), elastic)
        for name in ("full", "L2", "L1", "k1", "L3-k2-w2-p4", "w1", "p5", "t0.5", "Lx5")
    }
    assert trained == {
        "full": True,
        "L2": True,
        "L1": False,
        "k1": True,
        "L3-k2-w2-p4": True,
        "w1": False,
        "p5": False,
        "t0.5": False,
        "Lx5": False,
    }
    assert is_trained(tiny.resolve("full"), None)
    assert not is_trained(tiny.resolve("k1"), None)
