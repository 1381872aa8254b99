"""Loads are counted, evened out within a pool by a loss, and by a bias where a router has one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elastic_moe.model.reference.transformer import ElasticTransformer, LayerTrace, Trace
from elastic_moe.routing import resolve
from elastic_moe.train.models import ELASTIC_MINI
from elastic_moe.train.step.balance import Loads, expert_loads, move_biases
from elastic_moe.train.step.loss import balance_loss
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.trainer import Trainer
from tests.train.tiny import CONFIG, PLAN, stream

SHAPE = ELASTIC_MINI.shape
BIASED = replace(CONFIG, model_type="ernie4_5_moe", selection_bias=True)


def biased_trainer(sampling: SamplingPlan, **changes: float) -> Trainer:
    stages = parse_stages("6x40x1x128")
    plan: TrainingPlan = replace(PLAN, stages=stages, sampling=sampling, **changes)
    return Trainer(BIASED, plan, stream())


def biases(model: ElasticTransformer) -> torch.Tensor:
    """(L, E)."""
    return torch.stack([layer.mlp.correction_bias.detach().clone() for layer in model.layers])


def test_loads_count_what_ran() -> None:
    ids = torch.tensor([[0, 1, 2], [2, -1, -1]])
    trace = Trace([LayerTrace(3, torch.zeros(2, 16), ids), LayerTrace(5, torch.zeros(2, 16), ids)])
    loads = expert_loads(trace)
    assert loads.layers == (3, 5)
    assert loads.counts[0].tolist() == loads.counts[1].tolist() == [1, 1, 2] + [0] * 13
    assert loads.mean_experts() == trace.mean_experts() == 2.0
    assert expert_loads(Trace()).mean_experts() == 0.0


def test_balance_is_one_when_experts_share_equally_and_grows_when_they_do_not() -> None:
    subnet = resolve(SHAPE, expert_pool=8)
    even = torch.arange(8).view(2, 4)
    flat = torch.zeros(2, 16)
    assert float(balance_loss(Trace([LayerTrace(0, flat, even)]), subnet)) == pytest.approx(1.0)
    crowded = torch.zeros(2, 16)
    crowded[:, :4] = 5.0
    same = torch.arange(4).expand(2, 4)
    assert float(balance_loss(Trace([LayerTrace(0, crowded, same)]), subnet)) > 1.9
    outside = torch.zeros(2, 16)
    outside[:, 12] = 50.0  # no expert of the pool: must not count
    found = balance_loss(Trace([LayerTrace(0, outside, even)] * 2), subnet)
    assert float(found) == pytest.approx(2.0)
    assert float(balance_loss(Trace(), subnet)) == 0.0


def test_a_reduced_pool_is_balanced_within_itself() -> None:
    subnet = resolve(SHAPE, top_k=3, expert_pool=[1, 3, 8])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 16, generator=generator, requires_grad=True)
    ids = torch.tensor([[1, 3, 8]] * 3 + [[8, -1, -1]] * 3)
    loss = balance_loss(Trace([LayerTrace(0, logits, ids)]), subnet)
    share = torch.tensor([3, 3, 6]) / 12
    expected = 3 * (share * logits[:, [1, 3, 8]].softmax(-1).mean(0)).sum()
    torch.testing.assert_close(loss, expected)
    (found,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, wanted)
    outside = [e for e in range(16) if e not in (1, 3, 8)]
    assert torch.equal(found[:, outside], torch.zeros(6, 13))


def test_the_balance_loss_has_a_gradient_for_the_router() -> None:
    logits = torch.zeros(2, 16)
    logits[:, :4] = 2.0
    logits.requires_grad_()
    same = torch.arange(4).expand(2, 4)
    balance_loss(Trace([LayerTrace(0, logits, same)]), resolve(SHAPE)).backward()
    assert logits.grad is not None
    assert float(logits.grad[:, :4].min()) > 0  # away from the crowded experts
    assert float(logits.grad[:, 4:].max()) < 0


def test_biases_move_against_the_load_within_the_pool_that_ran() -> None:
    model = ElasticTransformer(BIASED)
    subnet = resolve(BIASED.shape, active_layers=[1, 4], expert_pool=4)
    counts = torch.tensor([[9, 1, 5, 5, 0, 0, 0, 0], [0, 8, 8, 8, 0, 0, 0, 0]])
    move_biases(model, Loads((1, 4), counts, 10), subnet, rate=0.25)
    found = biases(model)
    assert found[1].tolist() == [-0.25, 0.25, 0.0, 0.0, 0, 0, 0, 0]  # the mean stays where it is
    assert found[4].tolist() == [0.25, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert float(found[[0, 2, 3, 5]].abs().max()) == 0.0


def test_a_step_moves_the_biases_of_what_it_ran_by_the_rate_and_by_nothing_else() -> None:
    it = biased_trainer(SamplingPlan(fixed="L3-p4"), bias_rate=0.01)
    assert float(biases(it.model).abs().max()) == 0.0  # no expert is preferred at first
    it.train_step()
    moved = biases(it.model)
    assert set(moved[:3, :4].abs().unique().tolist()) <= {0.0, float(torch.tensor(0.01))}
    assert (moved[:3, :4] != 0).any(dim=1).all()
    assert float(moved[3:].abs().max()) == float(moved[:, 4:].abs().max()) == 0.0
    still = biased_trainer(SamplingPlan(fixed="L3-p4"))
    still.train_step()
    assert float(biases(still.model).abs().max()) == 0.0


def test_a_sandwich_moves_no_bias_further_than_the_rate() -> None:
    it = biased_trainer(SamplingPlan(), bias_rate=0.03, sandwich=True)
    it.train_step()
    moved = biases(it.model).abs()
    assert 0.0 < float(moved.max()) <= 0.0301
    assert float(moved.min()) < 0.02  # what the full network alone ran


def test_each_network_of_a_split_step_moves_biases_by_its_share() -> None:
    it = biased_trainer(SamplingPlan(depth=0, top_k=1, width=0, pool=0), bias_rate=0.04, split=0.75)
    it.train_step()
    moved = {round(float(value), 6) for value in biases(it.model).abs().unique()}
    assert {0.02, 0.04} & moved
    assert moved <= {0.0, 0.01, 0.02, 0.03, 0.04}


def test_biases_even_the_loads_out_without_a_loss() -> None:
    still = {"balance": 0.0, "muon_lr": 0.0, "adam_lr": 0.0}
    crowding = []
    for rate in (0.0, 0.02):
        it = biased_trainer(SamplingPlan(fixed="L2"), bias_rate=rate, **still)
        with torch.no_grad():
            for layer in it.model.layers:
                layer.mlp.correction_bias[:3] = 0.3  # at first these are all that are chosen
        for _ in range(30):
            it.train_step()
        inputs, _ = it.stream.batch(0, 4, 128)
        _, _, loads = it.forward(torch.from_numpy(inputs), resolve(BIASED.shape, depth=2))
        share = loads.counts / loads.counts.sum(1, keepdim=True)
        crowding.append(float((share.max(1).values * 8).mean()))  # 1 if all are equal
    assert crowding[0] == pytest.approx(8 / 3, rel=0.01)
    assert crowding[1] < 1.8
