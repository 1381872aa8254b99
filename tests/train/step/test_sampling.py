"""Draws of sub-networks follow their plan, and a plan that cannot be followed is refused."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import replace

import pytest

from elastic_moe.errors import TrainingError
from elastic_moe.routing import Subnet, resolve
from elastic_moe.train.models import ELASTIC_MINI
from elastic_moe.train.step.sampling import (
    AXES,
    SamplingPlan,
    fixed_subnet,
    sample_subnet,
    smallest_subnet,
)

SHAPE = ELASTIC_MINI.shape
FIRST_VERSION = SamplingPlan(
    full=0.75, depth=0.5, top_k=0.35, width=0.35, pool=0.35, threshold=0.25
)


def draw(plan: SamplingPlan, count: int, **options: bool) -> list[Subnet]:
    rng = random.Random(0)
    return [sample_subnet(SHAPE, plan, range(48), rng, **options) for _ in range(count)]


def reduced_axes(subnet: Subnet) -> set[str]:
    """What a sub-network of elastic-mini has less of, as far as its values tell."""
    k, pool = subnet.uniform("top_k"), len(subnet.uniform("expert_pool"))
    return {
        axis
        for axis, changed in {
            "depth": subnet.depth < 48,
            "prefix": subnet.is_prefix and subnet.depth < 48,
            "subset": not subnet.is_prefix,
            "top_k": k != 4,
            "one top_k": k in (1, 2, 3),
            "top_k per layer": k is None,
            "width": subnet.uniform("expert_width") != 8,
            "pool": pool < 16,
            "threshold": subnet.uniform("sparsity_threshold") > 0,
        }.items()
        if changed
    }


def test_every_axis_is_reduced_in_its_own_share_of_the_steps() -> None:
    found = [reduced_axes(subnet) for subnet in draw(SamplingPlan(), 4000)]
    seen = Counter(axis for axes in found for axis in axes)
    shares = {"depth": 0.25, "top_k": 0.20, "width": 0.20, "pool": 0.20, "threshold": 0.10}
    for axis, share in shares.items():
        assert seen[axis] / 4000 == pytest.approx(share, abs=0.02), axis
    # Independently: both of two axes come up as often as the product of their shares says.
    together = sum({"depth", "pool"} <= axes for axes in found) / 4000
    assert together == pytest.approx(0.25 * 0.20, abs=0.01)
    whole = sum(not axes for axes in found) / 4000
    assert whole == pytest.approx(0.75 * 0.80**3 * 0.90, abs=0.02)


def test_a_share_of_full_steps_may_be_given_and_the_others_reduce_something() -> None:
    subnets = draw(FIRST_VERSION, 2000)
    full = sum(subnet == Subnet.full(SHAPE) for subnet in subnets) / 2000
    assert full == pytest.approx(0.75, abs=0.02)
    seen = Counter(axis for subnet in subnets for axis in reduced_axes(subnet))
    assert min(seen.values()) > 20
    assert len(seen) == 9
    assert {s.depth for s in subnets} == set(range(6, 49, 6))
    assert {s.uniform("expert_pool") for s in subnets} == {tuple(range(p)) for p in (4, 8, 12, 16)}


@pytest.mark.parametrize(
    ("plan", "digest"),
    [(FIRST_VERSION, "541af4f91cd4"), (SamplingPlan(), "182d43fbe489")],
    ids=["first-version", "default"],
)
def test_draws_stay_what_they_were_when_checkpoints_were_trained_with_them(
    plan: SamplingPlan, digest: str
) -> None:
    """By names, which a new axis does not change."""
    names = " ".join(subnet.name for subnet in draw(plan, 400))
    assert hashlib.sha256(names.encode()).hexdigest().startswith(digest)


def test_an_axis_that_is_never_reduced_leaves_the_draws_of_the_others_as_they_were() -> None:
    """By names, which a new axis does not change."""
    names = " ".join(subnet.name for subnet in draw(SamplingPlan(depth=0.0, pool=0.0), 400))
    assert hashlib.sha256(names.encode()).hexdigest().startswith("37ba2fb93e70")


def test_a_fixed_network_runs_every_step_cut_to_the_layers_that_have_grown() -> None:
    assert set(draw(SamplingPlan(fixed="p8"), 20)) == {resolve(SHAPE, expert_pool=8)}
    assert set(draw(SamplingPlan(fixed="full"), 20)) == {Subnet.full(SHAPE)}
    grown = range(0, 48, 4)
    cut = fixed_subnet(SHAPE, "L9-k2", grown)
    assert cut == resolve(SHAPE, active_layers=[0, 4, 8], top_k=2)
    assert fixed_subnet(SHAPE, "full", grown) == resolve(SHAPE, active_layers=grown)


def test_a_fixed_network_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"fixed = 'L49': depth must be .* \[1, 48\], got 49"):
        fixed_subnet(SHAPE, "L49", range(48))
    with pytest.raises(TrainingError, match="fixed = 'Lx2' runs none of the 12 layers"):
        fixed_subnet(SHAPE, "Lx2", range(0, 48, 4))


def test_the_smallest_network_has_the_least_of_every_axis_with_a_chance() -> None:
    assert smallest_subnet(SHAPE, SamplingPlan(), range(48)).name == "L6-k1-w2-p4"
    only_k = SamplingPlan(depth=0, width=0, pool=0, threshold=0)
    assert smallest_subnet(SHAPE, only_k, range(48)).name == "k1"
    no_k = replace(SamplingPlan(), top_k=0.0)
    assert smallest_subnet(SHAPE, no_k, range(48)).name == "L6-w2-t0.9-p4"
    grown = smallest_subnet(SHAPE, SamplingPlan(), range(0, 48, 4))
    assert grown.active_layers == (0, 4)
    costs = [s.flops_per_token(256) for s in draw(SamplingPlan(), 2000)]
    assert smallest_subnet(SHAPE, SamplingPlan(), range(48)).flops_per_token(256) <= min(costs)


def test_a_draw_can_be_asked_to_reduce_something() -> None:
    assert all(reduced_axes(s) for s in draw(SamplingPlan(per_layer=0.0), 500, reduced=True))


def test_models_with_few_experts_and_granules_can_be_drawn_from() -> None:
    small = replace(SHAPE, num_experts=2, max_top_k=2, width_granules=1, num_layers=1)
    small = replace(small, moe_layers=frozenset({0}))
    always = SamplingPlan(**dict.fromkeys(AXES, 1.0))
    rng = random.Random(0)
    for _ in range(200):
        subnet = sample_subnet(small, always, [0], rng)
        assert (subnet.depth, len(subnet.uniform("expert_pool"))) == (1, 1)
    assert smallest_subnet(small, always, [0]).uniform("expert_pool") == (0,)
    no_k = smallest_subnet(small, replace(always, top_k=0.0), [0])
    assert (no_k.uniform("expert_pool"), no_k.uniform("top_k")) == ((0,), 1)


@pytest.mark.parametrize("layers", range(1, 17))
def test_a_reduced_depth_is_below_the_full_one(layers: int) -> None:
    few = replace(SHAPE, num_layers=layers, moe_layers=frozenset(range(layers)))
    always = SamplingPlan(depth=1.0, top_k=0, width=0, pool=0, threshold=0)
    rng = random.Random(0)
    depths = {sample_subnet(few, always, range(layers), rng).depth for _ in range(200)}
    assert max(depths) == (layers - max(1, round(layers / 8)) if layers > 4 else max(1, layers - 1))
    assert min(depths) == max(1, round(layers / 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 1.5}, r"sampling: depth must be a number in \[0, 1\], got 1\.5"),
        ({"pool": float("nan")}, r"pool must be a number in \[0, 1\], got nan"),
        ({"width": "0.2"}, r"width must be a number in \[0, 1\], got '0\.2'"),
        ({"full": -0.1}, r"full must be a number in \[0, 1\], got -0\.1"),
        ({"prefix": 2}, "prefix must be"),
        ({"per_layer": None}, "per_layer must be"),
        ({"depths": 1}, "depths must be an integer from 2, got 1"),
        ({"fixed": "K2"}, "fixed must be the name of a sub-network such as .*, got 'K2'"),
        ({"fixed": "L9", "full": 0.5}, "full = 0.5 and fixed = 'L9' are both given"),
        ({"full": 0.5, **dict.fromkeys(AXES, 0)}, "the chance of every axis is 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value)[:20],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        SamplingPlan(**values)
    assert SamplingPlan(depths=2).depths == 2
    assert SamplingPlan(full=1.0, **dict.fromkeys(AXES, 0)).can_reduce is False
