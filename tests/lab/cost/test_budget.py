"""The ledger: every figure against a sum made by hand, and what must hold of any ledger."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.errors import OptionError
from elastic_moe.lab.cost.budget import (
    MOST_NETWORKS,
    MOST_TOKENS,
    break_even,
    inelastic_flops,
    make_budget,
    networks_up_to,
    scratch_flops,
    usual_subnets,
)
from elastic_moe.lab.cost.training import stages_done
from elastic_moe.routing import ModelShape, Subnet, parse_name, resolve
from elastic_moe.train.ledger import replay
from elastic_moe.train.step.sampling import SamplingPlan
from tests.lab.cost.trainings import FULL_ONLY, SHAPE, SMALL_PLAN, STAGES, training
from tests.train.tiny import CONFIG

COSTS = st.integers(min_value=1, max_value=10**6)


def forward_by_hand(shape: ModelShape, subnet: Subnet, context: int) -> int:
    """Operations of one token, written out: Qwen3's layer, its head, no look-up."""
    D, d = shape.hidden_size, shape.head_dim
    H, G = shape.num_heads, shape.num_kv_heads
    total = 2 * shape.vocab_size * D + 4 * D  # head and final norm
    for layer in subnet.layers:
        if not layer.active:
            continue
        total += 2 * D * (H + 2 * G) * d + 2 * H * d * D  # q, k, v and output
        total += 2 * 2 * H * d * context  # scores, and their product with the values
        total += 4 * (2 * D + (H + G) * d)  # two norms, and those of queries and keys
        channels = shape.expert_hidden * layer.expert_width // shape.width_granules
        total += 2 * D * len(layer.expert_pool) + layer.top_k * 3 * 2 * D * channels
    return total


# --- counting


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_the_super_networks_flops_are_the_sum_over_its_steps(steps: int) -> None:
    by_hand = sum(
        3
        * forward_by_hand(SHAPE, SMALL_PLAN.subnet(SHAPE, step), (64, 128)[step >= 3])
        * (512, 1024)[step >= 3]
        for step in range(steps)
    )
    budget = make_budget(training(steps=steps))["super_network"]
    assert budget["flops"] == by_hand
    assert budget["tokens"] == 512 * min(steps, 3) + 1024 * max(0, steps - 3)


def test_reduced_steps_make_elastic_training_cheaper_than_inelastic() -> None:
    budget = make_budget(training())["super_network"]
    grown = resolve(SHAPE, active_layers=[0, 3])
    assert budget["inelastic_flops"] == 3 * (
        3 * 512 * forward_by_hand(SHAPE, grown, 64)
        + 5 * 1024 * forward_by_hand(SHAPE, resolve(SHAPE), 128)
    )
    assert 0.3 < budget["of_inelastic"] < 1


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_a_plan_of_full_steps_costs_exactly_the_inelastic_run(steps: int) -> None:
    budget = make_budget(training(FULL_ONLY, steps))["super_network"]
    assert budget["flops"] == budget["inelastic_flops"]
    assert budget["of_inelastic"] == 1


def test_distillation_costs_more_and_a_sandwich_more_than_an_inelastic_run() -> None:
    plain, inelastic = training(), inelastic_flops(SMALL_PLAN, SHAPE, 8)
    distilled = training(replace(SMALL_PLAN, distill=0.5))
    sandwich = training(
        replace(SMALL_PLAN, sandwich=True, sampling=replace(SMALL_PLAN.sampling, full=None))
    )
    assert plain.flops < distilled.flops < sandwich.flops
    assert sandwich.flops > inelastic
    for other, added in ((plain, 0), (distilled, distilled.flops - plain.flops), (sandwich, 0)):
        found = make_budget(other)["super_network"]
        assert found["inelastic_flops"] == inelastic
        assert found["distillation_flops"] == added


@pytest.mark.parametrize("name", ["full", "L4", "L3-k1", "w2-p4", "Lx2a"])
@pytest.mark.parametrize("steps", [2, 8])
def test_from_scratch_costs_what_a_run_of_that_network_alone_does(name: str, steps: int) -> None:
    plan = replace(SMALL_PLAN, sampling=SamplingPlan(fixed=name))
    subnet = parse_name(SHAPE, name)
    assert scratch_flops(SMALL_PLAN, steps, subnet) == replay(plan, SHAPE, steps).flops


def test_from_scratch_runs_a_layer_even_where_none_of_its_has_grown() -> None:
    subnet = resolve(SHAPE, active_layers=[2, 5])  # the first stage has 0 and 3
    first = resolve(SHAPE, active_layers=[2])
    expected = 3 * 512 * forward_by_hand(SHAPE, first, 64)
    assert scratch_flops(SMALL_PLAN, 1, subnet) == expected


def test_scratch_tokens_scale_a_training_from_scratch() -> None:
    subnet = parse_name(SHAPE, "L4-k2")
    same = scratch_flops(SMALL_PLAN, 8, subnet)
    tokens = training().tokens
    budget = make_budget(training(), [(subnet, 0)], scratch_tokens=10 * tokens)
    assert budget["scratch_tokens"] == 10 * tokens
    assert budget["context_tokens"] == SMALL_PLAN.stages[-1].length // 2
    assert budget["networks"][0]["scratch_flops"] == pytest.approx(10 * same)
    assert make_budget(training(), [(subnet, 0)])["networks"][0]["scratch_flops"] == same


def test_a_training_that_went_on_from_another_costs_both() -> None:
    subnet, first = parse_name(SHAPE, "L4-k2"), training(steps=5)
    second = training(FULL_ONLY, parent="first")
    alone = [make_budget(part, [(subnet, 300)]) for part in (first, second)]
    both = make_budget(second, [(subnet, 300)], earlier=[first])
    for field in ("steps", "tokens", "flops", "inelastic_flops", "distillation_flops"):
        assert both["super_network"][field] == sum(one["super_network"][field] for one in alone)
    (row,), (only,) = both["networks"], alone[1]["networks"]
    assert row["refinement_flops"] == only["refinement_flops"]
    assert row["scratch_flops"] == sum(one["networks"][0]["scratch_flops"] for one in alone)
    assert both["scratch_tokens"] == first.tokens + second.tokens
    assert [one["steps"] for one in both["trainings"]] == [5, 8]
    timed = [replace(part, seconds=2.0, timed_steps=part.steps) for part in (first, second)]
    measured = make_budget(timed[1], earlier=timed[:1])["super_network"]["measured"]
    assert measured["seconds"] == 4
    assert measured["flops_per_second"] == (first.flops + second.flops) / 4
    untimed = make_budget(timed[1], earlier=[first])["super_network"]["measured"]
    assert (untimed["seconds"], untimed["flops_per_second"]) == (2, None)


def test_what_a_training_began_with_is_told_as_not_counted() -> None:
    later = training(parent="first sha256:ab", tokens_before=4096)
    expected = {"parent": "first sha256:ab", "tokens": 4096}
    assert make_budget(later)["super_network"]["uncounted"] == expected
    assert make_budget(training())["super_network"]["uncounted"] is None
    assert make_budget(later, earlier=[training()])["super_network"]["uncounted"] is None
    third = training(FULL_ONLY, parent="second")
    assert make_budget(third, earlier=[later])["super_network"]["uncounted"] == expected


def test_a_training_of_another_model_is_not_counted_in() -> None:
    other = replace(training(), shape=replace(SHAPE, vocab_size=128))
    with pytest.raises(OptionError, match="Name a training that this one went on from"):
        make_budget(training(), earlier=[other])


def test_refinement_is_the_training_of_the_sub_network_alone() -> None:
    subnet = parse_name(SHAPE, "L3-k1-w2")
    (row,) = make_budget(training(), [(subnet, 700)])["networks"]
    assert row["refinement_flops"] == 3 * forward_by_hand(SHAPE, subnet, 128) * 700
    assert row["refinement_tokens"] == 700
    assert row["flops_per_token"] == forward_by_hand(SHAPE, subnet, 128)
    full = forward_by_hand(SHAPE, resolve(SHAPE), 128)
    assert row["of_full_per_token"] == row["flops_per_token"] / full


def test_without_refinements_the_usual_sub_networks_are_told_of_unrefined() -> None:
    rows = make_budget(training())["networks"]
    assert [row["name"] for row in rows] == ["L4", "L3", "L1", "k1", "L3-k1"]
    assert {row["refinement_flops"] for row in rows} == {0}
    smallest = replace(CONFIG, num_layers=1, max_top_k=1).shape
    assert [subnet.name for subnet in usual_subnets(smallest)] == ["full"]


def test_stages_end_where_the_steps_do() -> None:
    assert stages_done(SMALL_PLAN, 3) == [(STAGES[0], 3 * 512)]
    assert stages_done(SMALL_PLAN, 4) == [(STAGES[0], 3 * 512), (STAGES[1], 1024)]


# --- sharing


@given(shared=COSTS, own=st.integers(min_value=0, max_value=10**6), scratch=COSTS)
def test_break_even_is_the_smallest_number_of_networks_that_pays(
    shared: int, own: int, scratch: int
) -> None:
    found = break_even(float(shared), float(own), float(scratch))
    if own >= scratch:
        assert found is None  # each network adds at least what it saves
        return
    assert found is not None
    assert shared + found * own < found * scratch
    assert found == 1 or shared + (found - 1) * own >= (found - 1) * scratch


@given(shared=st.integers(1, 300), own=st.integers(0, 40), scratch=st.integers(1, 40))
def test_break_even_by_trying_every_number(shared: int, own: int, scratch: int) -> None:
    tried = [n for n in range(1, 400) if shared + n * own < n * scratch]
    assert break_even(shared, own, scratch) == (tried[0] if tried else None)


def test_break_even_is_exact_where_floats_are_not() -> None:
    shared, gain = 1.0909488141464916e18, 212.0
    assert int(shared) // int(gain) + 1 != math.floor(shared / gain) + 1
    assert break_even(shared, 0.0, gain) == int(shared) // int(gain) + 1


@settings(deadline=None, max_examples=30)
@given(
    refined=st.integers(0, 10**7),
    networks=st.integers(2, 300),
    name=st.sampled_from(["full", "L4", "L3-k1", "p4", "w1"]),
)
def test_more_networks_make_each_cheaper_and_more_tokens_make_it_dearer(
    refined: int, networks: int, name: str
) -> None:
    subnet, source = parse_name(SHAPE, name), training()
    (row,) = make_budget(source, [(subnet, refined)], networks=networks)["networks"]
    shared = row["shared"]
    assert [one["networks"] for one in shared][-1] == networks
    for less, more in pairwise(shared):
        assert less["networks"] < more["networks"]
        assert less["flops_per_network"] > more["flops_per_network"] >= row["refinement_flops"]
        assert less["refinement_of_total"] <= more["refinement_of_total"] <= 1
        total = [one["networks"] * one["flops_per_network"] for one in (less, more)]
        assert total[1] >= total[0] * (1 - 1e-12)
    assert shared[0]["flops_per_network"] == source.flops + row["refinement_flops"]
    assert shared[0]["of_super_network"] == pytest.approx(1 + row["refinement_of_super_network"])
    (dearer,) = make_budget(source, [(subnet, refined + 1000)], networks=networks)["networks"]
    assert dearer["refinement_flops"] > row["refinement_flops"]
    assert dearer["scratch_flops"] == row["scratch_flops"]
    least, later = row["break_even_networks"], dearer["break_even_networks"]
    assert later is None or (least is not None and least <= later)
    for one in shared:
        pays = one["of_scratch"] < 1
        assert pays == (least is not None and one["networks"] >= least)


def test_the_mean_and_the_sum_are_those_of_the_networks() -> None:
    source = training()
    budget = make_budget(
        source, [(parse_name(SHAPE, "L4"), 5000), (parse_name(SHAPE, "k1"), 0)], networks=4
    )
    rows, mean, together = budget["networks"], budget["mean"], budget["together"]
    for field in ("refinement_flops", "scratch_flops"):
        assert mean[field] == sum(row[field] for row in rows) / 2
    assert together["flops"] == source.flops + rows[0]["refinement_flops"]
    assert together["scratch_flops"] == sum(row["scratch_flops"] for row in rows)
    assert together["of_scratch"] == together["flops"] / together["scratch_flops"]
    pair = next(one for one in mean["shared"] if one["networks"] == 2)
    assert pair["flops_per_network"] == together["flops"] / 2


def test_numbers_of_networks_double_up_to_the_last() -> None:
    assert networks_up_to(1) == [1]
    assert networks_up_to(8) == [1, 2, 4, 8]
    assert networks_up_to(9) == [1, 2, 4, 8, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": 0}, r"^networks must be in \[1, 1,000,000,000\], got 0\.$"),
        ({"networks": 10**320}, r"^networks must be in .*, got 10{76}\.\.\.\.$"),
        ({"networks": 10**5000}, r"^networks must be in .*, got <int of too many digits>\.$"),
        ({"scratch_tokens": 0}, r"^scratch_tokens must be in \[1, 1(,000){9}\], got 0\.$"),
        ({"scratch_tokens": 10**28}, "^scratch_tokens must be in "),
        ({"refinements": [(resolve(SHAPE, depth=4), -1)]}, r"L4 on must be in \[0, .*, got -1\.$"),
        ({"refinements": [(resolve(SHAPE), 10**400)]}, "full on must be in "),
    ],
)
def test_numbers_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_budget(training(), **changes)


def test_the_largest_numbers_have_a_ledger() -> None:
    most = [(resolve(SHAPE), MOST_TOKENS)]
    budget = make_budget(training(), most, networks=MOST_NETWORKS, scratch_tokens=MOST_TOKENS)
    json.dumps(budget, allow_nan=False)
    assert budget["mean"]["shared"][-1]["networks"] == MOST_NETWORKS
