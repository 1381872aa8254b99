"""What an operator allows: nothing beyond it runs, and the answer says what was changed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from elastic_moe import Engine, Subnet
from elastic_moe.errors import RoutingError, ServerError
from elastic_moe.protocol import RoutingConfig
from elastic_moe.protocol.routing import changes
from elastic_moe.routing import resolve
from elastic_moe.routing.axes import TRAINED
from elastic_moe.server.routing.limits import Limits
from tests.server.conftest import Running
from tests.server.routing.test_on_wire import draw_knobs


def draw_limits(draw: random.Random, engine: Engine) -> Limits:
    shape = engine.shape

    def bounds(low: int, high: int) -> tuple[int | None, int | None]:
        least, most = sorted(draw.randint(low, high) for _ in range(2))
        return draw.choice([least, None]), draw.choice([most, None])

    top_k = bounds(1, shape.max_top_k)
    return Limits(
        depth=bounds(1, shape.num_layers),
        top_k=top_k,
        expert_width=bounds(1, shape.width_granules),
        expert_pool=bounds(top_k[0] or 1, shape.num_experts),
        sparsity=draw.choice([(None, None), (0.25, 0.5), (None, 0.125), (0.75, None)]),
    )


def is_within(value: float, bounds: tuple[float | None, float | None]) -> bool:
    least, most = bounds
    return (least is None or least <= value) and (most is None or value <= most)


@pytest.mark.parametrize("seed", range(40))
def test_what_runs_is_within_the_limits_and_else_as_asked(served: Running, seed: int) -> None:
    draw = random.Random(seed)
    limits = draw_limits(draw, served.engine)
    limits.check(served.engine.shape)
    service = served.server.app.state.service
    knobs = draw_knobs(draw, served)
    if not any(key.lower().endswith(("top_k", "topk")) for key in knobs):
        knobs["top_k"] = 1  # the full value may be more than the pool
        knobs.pop("min_experts", None)
        knobs.pop("minExperts", None)
    config = RoutingConfig.model_validate(knobs)
    asked = service.routing.request("tiny", config, None).resolve(1).subnet
    runs = limits.apply(asked)
    assert is_within(runs.depth, limits["depth"])
    for index in runs.active_layers:
        layer, before = runs.layers[index], asked.layers[index]
        assert is_within(layer.top_k, limits["top_k"])
        assert is_within(layer.expert_width, limits["expert_width"])
        assert is_within(len(layer.expert_pool), limits["expert_pool"])
        assert is_within(layer.sparsity_threshold, limits["sparsity"])
        assert 1 <= layer.min_experts <= layer.top_k <= len(layer.expert_pool)
        if before.active:
            same = len(layer.expert_pool) == len(before.expert_pool)
            assert (layer.expert_pool == before.expert_pool) == same
            if is_within(before.top_k, limits["top_k"]) and before.top_k <= len(layer.expert_pool):
                assert layer.top_k == before.top_k
            if is_within(before.expert_width, limits["expert_width"]):
                assert layer.expert_width == before.expert_width
            if is_within(before.sparsity_threshold, limits["sparsity"]):
                assert layer.sparsity_threshold == before.sparsity_threshold
    if is_within(asked.depth, limits["depth"]):
        assert runs.active_layers == asked.active_layers
    assert limits.apply(runs) == runs
    strict = Limits(refuse=True, **{axis.name: limits[axis] for axis in TRAINED})
    if runs == asked:
        assert strict.apply(asked) == asked
        assert changes(asked, runs) == {}
    else:
        with pytest.raises(RoutingError, match="beyond this server's limits") as caught:
            strict.apply(asked)
        for axis in changes(asked, runs):
            assert axis in str(caught.value)


def test_depth_is_cut_from_the_top_and_filled_from_the_bottom(served: Running) -> None:
    shape = served.engine.shape
    layers = [0, shape.num_layers - 2, shape.num_layers - 1]
    asked = resolve(shape, active_layers=layers, top_k=1)
    cut = Limits(depth=(None, 2)).apply(asked)
    assert cut.active_layers == (0, shape.num_layers - 2)
    filled = Limits(depth=(4, None)).apply(resolve(shape, active_layers=[1], top_k=1))
    assert filled.active_layers == (0, 1, 2, 3)
    assert filled.uniform("top_k") == 1


def test_what_hangs_on_a_limited_axis_follows_it(served: Running) -> None:
    shape = served.engine.shape
    asked = resolve(shape, top_k=3, min_experts=3)
    assert Limits(top_k=(None, 2)).apply(asked) == resolve(shape, top_k=2, min_experts=2)
    assert Limits(expert_pool=(None, 1)).apply(asked).name == "k1-p1"
    small = resolve(shape, expert_pool=[1, 5], top_k=1)
    grown = Limits(top_k=(3, None)).apply(small)  # more experts than there were to choose from
    assert grown == resolve(shape, expert_pool=[0, 1, 5], top_k=3)


def test_an_answer_tells_what_the_limits_changed(start: Any) -> None:
    limited = start({"limits": Limits(depth=(None, 2), top_k=(None, 1))})
    done = limited.complete([5, 6, 7], max_tokens=2, temperature=0)
    shape = limited.engine.shape
    assert done["routing"]["depth"] == 2
    assert done["routing"]["name"] == "L2-k1"
    assert done["routing"]["limited"] == {
        "depth": {"asked": shape.num_layers, "applied": 2},
        "top_k": {"asked": shape.max_top_k, "applied": 1},
    }
    within = limited.complete([5, 6, 7], max_tokens=2, temperature=0, model="tiny@L2-k1")
    assert "limited" not in within["routing"]
    assert within["choices"] == done["choices"]  # it ran, and was not only reported
    answer = limited.post("/v1/embeddings", model="tiny", input="The")
    assert answer.json()["routing"]["limited"]["depth"]["applied"] == 2
    assert answer.headers["x-elastic-subnet"] == "L2-k1"


def test_limits_that_refuse_name_the_knob_and_the_nearest_value(start: Any) -> None:
    strict = start({"routing": "L2", "limits": Limits(depth=(None, 2), refuse=True)})
    assert strict.complete([5], max_tokens=1)["routing"]["name"] == "L2"
    error = strict.refused(400, model="tiny@L3")
    assert error["param"] == "routing_config"
    assert "depth 3 (nearest that is allowed: 2)" in error["message"]


@pytest.mark.parametrize(
    ("limits", "reported"),
    [
        (Limits(depth=(None, 99)), "max depth must be in"),
        (Limits(top_k=(0, None)), "min top_k must be in"),
        (Limits(depth=(3, 2)), "min depth is 3, above max depth, which is 2"),
        (Limits(sparsity=(None, float("nan"))), "max sparsity must be in"),
        (Limits(top_k=(2, None), expert_pool=(None, 1)), "above max expert_pool"),
    ],
)
def test_limits_that_the_model_cannot_obey_are_refused_at_the_start(
    tiny: Engine, limits: Limits, reported: str
) -> None:
    with pytest.raises(ServerError, match=reported):
        limits.check(tiny.shape)


def test_a_default_beyond_limits_that_refuse_is_refused_at_the_start(start: Any) -> None:
    with pytest.raises(RoutingError, match="depth"):
        start({"limits": Limits(depth=(None, 2), refuse=True)})


def test_equal_sub_networks_have_no_changes(tiny: Engine) -> None:
    assert changes(Subnet.full(tiny.shape), Subnet.full(tiny.shape)) == {}
