"""The frontier against its definition, the curves, and the numbers as readers see them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.lab.schema import full_values
from elastic_moe.lab.view.frontier import (
    clean,
    curves,
    decode_time,
    decode_time_range,
    difference_error,
    flops,
    format_percent,
    format_si,
    format_speed,
    format_value,
    frontier,
    full_point,
    mark_pareto,
    pareto_flags,
    pick,
    threshold_cost_is_measured,
    untrained_axes,
)
from elastic_moe.lab.view.labels import Box, place_labels
from elastic_moe.routing.axes import TRAINED
from tests.lab.view.synthetic import synthetic_point, synthetic_sweep

# Few values, so that ties are common; null and NaN as a timing-free or broken run gives them.
NUMBERS = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, None, math.nan])
POINTS = st.lists(
    st.builds(lambda c, b: {"flops_per_token": c, "bits_per_byte": b}, NUMBERS, NUMBERS),
    max_size=12,
)


def usable(point):
    values = (point["flops_per_token"], point["bits_per_byte"])
    return all(v is not None and math.isfinite(v) for v in values)


def excludes(other, point):
    cost, quality = "flops_per_token", "bits_per_byte"
    equal = other[cost] == point[cost] and other[quality] == point[quality]
    return not equal and other[cost] <= point[cost] and other[quality] <= point[quality]


@given(POINTS)
def test_flags_are_the_definition(points):
    expected = [usable(p) and not any(usable(o) and excludes(o, p) for o in points) for p in points]
    assert pareto_flags(points) == expected


@given(POINTS)
def test_somebody_is_on_the_frontier(points):
    assert any(pareto_flags(points)) == any(usable(p) for p in points)


def test_equals_stay_and_the_same_cost_for_less_quality_goes():
    points = [
        {"flops_per_token": c, "bits_per_byte": b}
        for c, b in [(2, 1.0), (2, 1.0), (2, 1.5), (3, 1.0), (1, 2.0)]
    ]
    mark_pareto(points)
    assert [p["pareto"] for p in points] == [True, True, False, False, True]


def noisy(cost: float, nats: float, deviations: list[float] | None, speeds: tuple = ()) -> dict:
    """A point whose bits are its nats; speeds are (slowest, median, fastest)."""
    point = {"name": f"{cost}", "flops_per_token": cost, "nats_per_token": nats}
    keys = [f"decode_tokens_per_second{end}" for end in ("_min", "", "_max")]
    point |= {"bits_per_byte": nats, "window_deviations": deviations}
    return point | dict(zip(keys, speeds, strict=True) if speeds else ())


def test_the_error_of_a_difference_is_that_over_paired_windows():
    a, b = noisy(1, 2.0, [0.01, -0.01, 0.0]), noisy(2, 1.0, [0.0, 0.0, 0.0])
    assert difference_error(a, b) == pytest.approx(math.sqrt(3 / 2 * 0.0002))
    assert difference_error(a, a) == 0  # what varies alike cancels
    assert difference_error(a, noisy(1, 2.0, None)) == 0
    assert difference_error(noisy(1, 2.0, [0.3]), noisy(1, 2.0, [0.1])) == 0


def test_a_dearer_point_is_on_the_frontier_only_beyond_two_errors():
    """Two windows of deviations d and -d against none: an error of 2 d."""
    even = [0.0, 0.0]
    for gain, flag in ((0.039, False), (0.041, True)):
        points = [noisy(1, 2.0, even), noisy(2, 2.0 - gain, [0.01, -0.01])]
        assert pareto_flags(points) == [True, flag]
        points[1]["window_deviations"] = None  # unknown errors: as it is measured
        assert pareto_flags(points) == [True, True]


def test_small_gains_add_up_until_they_are_beyond_errors():
    points = [noisy(c, 2.0 - 0.03 * c, [d, -d]) for c, d in enumerate([0.0, 0.01, -0.01, 0.0, 0.0])]
    assert pareto_flags(points) == [True, False, True, False, True]


def test_a_faster_point_is_on_the_frontier_only_beyond_the_spread_of_speeds():
    better, worse = ((90.0, 100.0, 110.0), 1.0), ((95.0, 105.0, 112.0), 2.0)
    points = [noisy(1, nats, None, speeds) for speeds, nats in (better, worse)]
    flags = pareto_flags(points, decode_time, decode_time_range)
    assert flags == [True, False]  # better beyond errors, and perhaps no slower
    points[1] |= {"decode_tokens_per_second_min": 111.0, "decode_tokens_per_second": 111.5}
    assert pareto_flags(points, decode_time, decode_time_range) == [True, True]
    for point in points:
        point["decode_tokens_per_second_min"] = None
    assert pareto_flags(points, decode_time, decode_time_range) == [True, True]


ERRORS = st.lists(
    st.builds(
        lambda c, b, d, s, w: noisy(c, b, [d, -d], (s - w, s, s + w)),
        st.integers(1, 5),
        st.integers(1, 9).map(float),
        st.sampled_from([0.0, 0.3, 0.6, 1.0]),
        st.integers(20, 25).map(float),
        st.integers(0, 3).map(float),
    ),
    min_size=1,
    max_size=10,
)


@given(ERRORS, st.booleans())
def test_of_two_points_on_the_frontier_one_is_better_and_the_other_cheaper_beyond_errors(
    points, speed
):
    costs = (decode_time, decode_time_range) if speed else (flops,)
    on_it = frontier(points, *costs)
    assert on_it
    for i, cheap in enumerate(on_it):
        for dear in on_it[i + 1 :]:
            if costs[0](cheap) == costs[0](dear):
                assert cheap["bits_per_byte"] == dear["bits_per_byte"]
                continue
            gain = cheap["nats_per_token"] - dear["nats_per_token"]
            assert gain > 0
            assert gain > 2 * difference_error(cheap, dear) - 1e-9
            if speed:
                fastest = dear["decode_tokens_per_second_max"]
                assert cheap["decode_tokens_per_second_min"] > fastest


def test_synthetic_flags_agree():
    points = synthetic_sweep()["points"]
    assert pareto_flags(points) == [p["pareto"] for p in points]


def test_frontier_of_speed_leaves_out_what_was_not_timed():
    points = [synthetic_point(), synthetic_point(24), synthetic_point(12)]
    points[1]["decode_tokens_per_second"] = None
    assert [p["name"] for p in frontier(points, decode_time)] == ["L12", "full"]


def test_curves_change_one_axis_and_contain_the_full_network():
    sweep = synthetic_sweep()
    lists = curves(reversed(sweep["points"]), full_point(sweep["points"]))
    assert {key: [p["name"] for p in members] for key, members in lists.items()} == {
        **{axis.name: ["full"] for axis in TRAINED},
        "depth": ["L12", "L24", "L36", "full"],
        "top_k": ["k1", "k2", "k3", "full"],
        "expert_width": ["w2", "w4", "w6", "full"],
        "sparsity_threshold": ["full", "t0.25", "t0.5", "t0.75", "t1"],
        "expert_pool": ["p4", "p8", "p12", "full"],
    }


def test_curves_without_the_full_network():
    sweep = synthetic_sweep()
    lists = curves(sweep["points"][1:], full_values(sweep["model"]))
    assert [p["name"] for p in lists["top_k"]] == ["k1", "k2", "k3"]
    assert lists["depth"]
    assert curves([], full_values(sweep["model"]))["depth"] == []


@pytest.mark.parametrize("name", ["Lx3f", "L36-m2", "m2-t0.5", "x0badcafe"])
def test_what_differs_beyond_the_axes_is_on_no_curve(name):
    point = synthetic_point(36) | {"name": name}
    assert not any(curves([point], full_values(synthetic_sweep()["model"])).values())


def test_untrained_values_are_named():
    model = synthetic_sweep()["model"]
    assert untrained_axes(synthetic_point(pool=12), model) == {"expert_pool"}
    assert untrained_axes(synthetic_point(24, 2), model) == set()
    assert untrained_axes(synthetic_point(24, 2), model | {"elastic_moe": None}) == {
        "depth",
        "top_k",
    }
    close = synthetic_point(threshold=0.25) | {"sparsity_threshold": 0.25000001}
    assert untrained_axes(close, model) == set()


def test_pick_is_the_cheapest_near_the_full_network_and_trained():
    points = synthetic_sweep()["points"]
    full = full_point(points)
    found = pick(points, full)
    near = [
        p
        for p in points
        if p["trained"] and p["bits_per_byte"] <= full["bits_per_byte"] * (1 + found.tolerance)
    ]
    assert found.point in near
    assert found.point["flops_per_token"] == min(p["flops_per_token"] for p in near)
    assert found.flops <= 0.75
    for point in points:  # trained, but for nothing that saves a quarter
        point["trained"] = point["name"] in ("full", "k3")
    assert pick(points, full) is None
    for point in points:  # for nothing at all, as in ordinary checkpoints: then all may be named
        point["trained"] = point["name"] == "full"
    assert pick(points, full) == found


def test_threshold_cost_is_told_from_the_figures():
    full, sparse = synthetic_point(), synthetic_point(threshold=0.5)
    assert threshold_cost_is_measured([full, sparse], full) is True
    bound = sparse | {"flops_per_token": full["flops_per_token"]}
    assert threshold_cost_is_measured([full, bound], full) is False
    assert threshold_cost_is_measured([full], full) is None


def test_numbers_as_readers_see_them():
    assert format_si(15.23e6, "FLOP") == "15.2 MFLOP"
    assert format_si(999_960.0) == "1.00 M"
    assert format_si(44.1e6, "B") == "44.1 MB"
    assert format_si(12.0) == "12.0"
    assert format_si(0.0, "B") == "0.00 B"
    assert format_si(None) == format_speed(None) == format_percent(None) == "-"
    assert format_speed(1234.4) == "1,234 tok/s"
    assert format_speed(42.17) == "42.2 tok/s"
    assert format_percent(0.614) == "61 %"
    assert format_value(0.699999988079071) == "0.7"
    assert format_value(12) == "12"


@given(st.text(max_size=200))
def test_cleaned_text_is_printable_and_short(text):
    line = clean(text)
    assert line.isprintable()
    assert len(line) <= 80
    line.encode("utf-8")


def test_axes_name_fields_of_points_and_model():
    sweep = synthetic_sweep()
    for axis in TRAINED:
        assert axis.name in sweep["points"][0]
        assert axis.trained in sweep["model"]["elastic_moe"]["trained"]


PIXELS = st.tuples(st.floats(0, 400), st.floats(0, 300))


@given(st.lists(PIXELS, max_size=25))
def test_labels_never_cover_anything(centres):
    dots = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    bounds = Box(0, 0, 400, 300)
    sizes = [(40.0, 11.0)] * len(dots)
    placed = place_labels(dots, sizes, dots, [], bounds, (1.0, 0.5))
    assert len(placed) == len(dots)
    boxes = [box for box in placed if box is not None]
    for i, box in enumerate(boxes):
        assert box.inside(bounds)
        assert not any(box.overlaps(other) for other in (*dots, *boxes[:i]))


def test_a_lonely_label_stands_on_the_empty_side():
    dot = Box(195, 145, 205, 155)
    (box,) = place_labels([dot], [(40, 11)], [dot], [], Box(0, 0, 400, 300), (-1.0, 0.5))
    assert box is not None
    assert box.centre[0] < 200


def test_a_segment_through_a_box_crosses_it():
    box = Box(0, 0, 10, 10)
    assert box.crosses(((-5, 5), (15, 5)))
    assert box.crosses(((5, 5), (6, 6)))
    assert not box.crosses(((-5, 11), (15, 11)))
    assert not box.crosses(((11, -5), (30, 5)))
