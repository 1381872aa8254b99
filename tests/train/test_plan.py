"""Draws of sub-networks follow the plan, and the ledger tells them truly."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise

import pytest

from elastic_moe.errors import TrainingError
from elastic_moe.model.folder import BUNDLED
from elastic_moe.routing import Subnet
from elastic_moe.train.ledger import replay
from elastic_moe.train.mini import ELASTIC_MINI
from elastic_moe.train.plan import Stage, TrainingPlan, parse_stages
from elastic_moe.train.sampling import SamplingPlan, sample_subnet

SHAPE = ELASTIC_MINI.shape


def test_three_quarters_of_the_steps_run_the_whole_network_and_all_axes_are_drawn() -> None:
    rng = random.Random(0)
    subnets = [sample_subnet(SHAPE, SamplingPlan(), range(48), rng) for _ in range(4000)]
    full = sum(subnet == Subnet.full(SHAPE) for subnet in subnets) / 4000
    assert full == pytest.approx(0.75, abs=0.02)
    reduced = [subnet for subnet in subnets if subnet != Subnet.full(SHAPE)]
    assert len(reduced) == 4000 - round(full * 4000)  # a reduced step reduces something
    seen = Counter(
        axis
        for s in reduced
        for axis, changed in {
            "prefix": s.is_prefix and s.depth < 48,
            "subset": not s.is_prefix,
            "k": s.uniform("top_k") in (1, 2, 3),
            "k per layer": s.uniform("top_k") is None,
            "width": s.uniform("width") != 8,
            "pool": len(s.uniform("pool")) < 16,
            "threshold": s.uniform("threshold") > 0,
        }.items()
        if changed
    )
    assert min(seen.values()) > 40
    assert len(seen) == 7
    assert {s.depth for s in reduced} == set(range(6, 49, 6))
    pools = {s.uniform("pool") for s in reduced}
    assert pools == {tuple(range(p)) for p in (4, 8, 12, 16)}  # nested


def test_a_network_that_has_not_grown_yet_runs_layers_spread_over_its_depth() -> None:
    plan = TrainingPlan(stages=parse_stages("12x200x4x256,24x1x4x256,48x1x4x256"))
    assert plan.stages[0].grown(48) == list(range(0, 48, 4))
    assert plan.stages[1].grown(48) == list(range(0, 48, 2))
    assert plan.stages[2].grown(48) == list(range(48))
    subnets = [plan.subnet(SHAPE, step) for step in range(200)]
    assert all(set(s.active_layers) <= set(range(0, 48, 4)) for s in subnets)
    assert max(len(s.active_layers) for s in subnets) == 12
    prefixes = {s.active_layers for s in subnets}
    assert (0, 4, 8) in prefixes


def test_rates_warm_up_stay_and_decay() -> None:
    plan = TrainingPlan(stages=(Stage(1000, 48, 4, 256),), warmup_steps=10, decay_fraction=0.2)
    scales = [plan.lr_scale(step) for step in range(1000)]
    assert scales[0] == 0.1
    assert scales[9:800] == [1.0] * 791
    assert scales[900] == pytest.approx(0.5)
    assert scales[-1] == plan.final_lr
    assert all(after <= before for before, after in pairwise(scales[9:]))


def test_stages_are_read_and_checked() -> None:
    stages = parse_stages("12x10x4x256,48x5x8x512")
    assert stages == (Stage(10, 12, 4, 256), Stage(5, 48, 8, 512))
    plan = TrainingPlan(stages=stages)
    assert [plan.stage(step).layers for step in (0, 9, 10, 14)] == [12, 12, 48, 48]
    with pytest.raises(TrainingError, match="step 15 is past the plan, which has 15 steps"):
        plan.stage(15)
    for bad in ("12x10x4", "axbxcxd", "12x10x4x300", "0x1x1x256"):
        with pytest.raises(TrainingError, match="stage"):
            parse_stages(bad)
    assert TrainingPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_stage_with_more_layers_than_the_model_is_refused() -> None:
    plan = TrainingPlan(stages=parse_stages("12x1x4x256,49x1x4x256"))
    plan.check(49)
    with pytest.raises(TrainingError, match=r"stage 1: layers must be in \[1, 48\], got 49"):
        plan.check(48)


def test_the_work_of_a_plan_is_tokens_times_layers() -> None:
    plan = TrainingPlan(stages=parse_stages("12x10x4x256,48x5x8x512"))
    first, second = 12 * 4 * 512, 48 * 8 * 512
    assert [plan.work(n) for n in (0, 1, 10, 11, 15)] == [
        0,
        first,
        10 * first,
        10 * first + second,
        10 * first + 5 * second,
    ]


def test_the_ledger_counts_what_the_plan_draws() -> None:
    plan = TrainingPlan(stages=parse_stages("12x40x4x256,48x60x8x512"))
    ledger = replay(plan, SHAPE, 100)
    subnets = [plan.subnet(SHAPE, step) for step in range(100)]
    assert ledger.tokens == 40 * 4 * 512 + 60 * 8 * 512
    assert ledger.full_steps == sum(s.name in ("Lx111111111111", "full") for s in subnets)
    assert all(sum(counts.values()) == 100 for counts in ledger.draws.values())
    late = [s.depth for s in subnets[40:] if s.is_prefix]
    assert ledger.trained["depth"] == set(late)
    expected = sum(
        3 * s.flops_per_token(128 if step < 40 else 256) * (2048 if step < 40 else 4096)
        for step, s in enumerate(subnets)
    )
    assert ledger.flops == pytest.approx(expected)


def test_the_bundled_manifest_agrees_with_a_replay_of_its_plan() -> None:
    folder = BUNDLED / "elastic-mini"
    training = json.loads((folder / "manifest.json").read_text())["training"]
    plan = TrainingPlan.from_json(training["plan"])
    ledger = replay(plan, SHAPE, training["steps"])
    assert ledger.draws_to_json() == training["draws"]
    assert ledger.tokens == training["tokens"]
    assert ledger.flops == pytest.approx(training["flops"])
    assert ledger.full_steps / ledger.steps == pytest.approx(0.75, abs=0.03)
    trained = json.loads((folder / "config.json").read_text())["elastic_moe"]["trained"]
    assert {axis: set(values) for axis, values in trained.items()} == ledger.trained
