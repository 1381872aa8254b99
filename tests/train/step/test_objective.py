"""What a step minimises, against plain PyTorch: distillation in place, sandwiches, bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.reference.layers import Attention, Linear
from elastic_moe.model.reference.moe import MoE, run_experts
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import Subnet, parse_name
from elastic_moe.train.experts.mixed import attend_bfloat16, multiply_bfloat16
from elastic_moe.train.step import trainer as trainer_module
from elastic_moe.train.step.loss import HeadLoss, balance_loss, head_loss
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.trainer import Trainer
from tests.train.tiny import CONFIG, PLAN, stream

NATIVE = replace(CONFIG, head_dim=16)  # of a head size that the C++ kernels take
REDUCED = SamplingPlan(depth=1.0, top_k=1.0, width=1.0, pool=0.0, threshold=0.0, per_layer=0.0)


@pytest.fixture(params=[CONFIG, NATIVE], ids=["reference", "cpu"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Of a model that is trained in PyTorch, and of one that is trained on the C++ kernels."""
    config: ModelConfig = request.param
    assert Trainer(config, PLAN, stream()).backend == ("cpu" if config is NATIVE else "reference")
    return config


def awake(config: ModelConfig = CONFIG, **changes: Any) -> Trainer:
    """A trainer whose every weight matters and which keeps its gradients instead of stepping."""
    stages = parse_stages("6x40x1x128")
    plan: TrainingPlan = replace(PLAN, stages=stages, clip=1e9, sampling=REDUCED)
    it = Trainer(config, replace(plan, **changes), stream())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in it.model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2, generator=generator)
    for optimizer in (it.muon, it.adam):
        optimizer.step = lambda: None
        optimizer.zero_grad = lambda **_: None
    return it


def readable(model: ElasticTransformer) -> ElasticTransformer:
    """A copy of a model in which every part is the oracle's."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, MoE):
            module.run_experts = run_experts
    return plain


def plain_loss(
    model: ElasticTransformer, batch: tuple, subnet: Subnet, share: float, balance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, KL) of one sub-network, which is distilled from the full one by `share`."""
    inputs, targets = (torch.from_numpy(array) for array in batch)
    trace = Trace()
    own = model(inputs, subnet, trace=trace).flatten(0, 1).log_softmax(-1)
    with torch.no_grad():
        teacher = model(inputs, Subnet.full(model.config.shape)).flatten(0, 1).log_softmax(-1)
    kl = (teacher.exp() * (teacher - own)).sum(-1).mean()
    loss = (1 - share) * F.nll_loss(own, targets.flatten()) + share * kl
    return loss + balance * balance_loss(trace, subnet), kl.detach()


def assert_same_gradients(found: ElasticTransformer, wanted: ElasticTransformer) -> None:
    expected = dict(wanted.named_parameters())
    for name, p in found.named_parameters():
        assert (p.grad is None) == (expected[name].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_split_step_minimises_the_mean_over_the_tokens_of_both_networks(
    share: float, config: ModelConfig
) -> None:
    it = awake(config, split=0.75, distill=share)
    plain = readable(it.model)
    record = it.train_step()
    full, drawn = (one.subnet for one in it.plan.passes(config.shape, 0))
    assert (record["subnet"], record["split"]) == ("full", [drawn.name])
    assert full == Subnet.full(config.shape) != drawn
    batch, losses = it.stream.batch(0, 1, 128), []
    for subnet, rows, weight, own in ((full, slice(3), 0.75, 0), (drawn, slice(3, 4), 0.25, share)):
        part = tuple(array[rows] for array in batch)
        loss, kl = plain_loss(plain, part, subnet, own, it.plan.balance)
        (loss * weight).backward()
        losses.append(plain_loss(plain, part, subnet, 0.0, 0.0)[0].item())
    assert_same_gradients(it.model, plain)
    assert record["loss"] == pytest.approx(losses[0], abs=1e-3)
    assert record["split_loss"] == [pytest.approx(losses[1], abs=1e-3)]
    assert record.get("distilled") == (pytest.approx(float(kl), abs=1e-4) if share else None)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_reduced_network_learns_from_the_text_and_from_the_full_one(
    share: float, config: ModelConfig
) -> None:
    it = awake(config, distill=share)
    plain = readable(it.model)
    record = it.train_step()
    subnet = it.plan.subnet(config.shape, 0)
    assert record["subnet"] == subnet.name != "full"
    loss, kl = plain_loss(plain, it.stream.batch(0, 1, 128), subnet, share, it.plan.balance)
    loss.backward()
    assert_same_gradients(it.model, plain)
    if share:
        assert record["distilled"] == pytest.approx(float(kl), abs=1e-4)
        assert float(kl) > 0.01
    else:
        assert "distilled" not in record


def test_the_full_network_has_no_teacher(config: ModelConfig) -> None:
    it = awake(config, distill=0.5, sampling=replace(REDUCED, full=0.99))
    full = Subnet.full(config.shape)
    assert it.plan.subnet(config.shape, 0) == full
    plain = readable(it.model)
    assert "distilled" not in it.train_step()
    batch = it.stream.batch(0, 1, 128)
    plain_loss(plain, batch, full, 0.0, it.plan.balance)[0].backward()
    assert_same_gradients(it.model, plain)


@pytest.mark.parametrize(("distill", "share"), [(1.0, 1.0), (0.25, 0.25), (0.0, 0.0)])
def test_a_sandwich_is_the_mean_of_the_full_the_smallest_and_a_random_network(
    distill: float, share: float, config: ModelConfig
) -> None:
    it = awake(config, sandwich=True, distill=distill)
    plain = readable(it.model)
    record = it.train_step()
    full, smallest, drawn = (one.subnet for one in it.plan.passes(config.shape, 0))
    assert full == Subnet.full(config.shape)
    assert smallest == parse_name(config.shape, "L1-k1-w1")
    assert (record["subnet"], record["sandwich"]) == ("full", [smallest.name, drawn.name])
    distances = []
    for subnet, weight in ((full, 0.0), (smallest, share), (drawn, share)):
        batch = it.stream.batch(0, 1, 128)
        loss, kl = plain_loss(plain, batch, subnet, weight, it.plan.balance)
        (loss / 3).backward()
        distances.append(float(kl))
    assert_same_gradients(it.model, plain)
    if share:
        assert record["distilled"] == pytest.approx(sum(distances[1:]) / 2, abs=1e-4)
    else:
        assert "distilled" not in record


def test_the_record_tells_what_ran() -> None:
    it = awake(sampling=SamplingPlan(fixed="L3-k2-t0.9"))
    record = it.train_step()
    inputs, _ = it.stream.batch(0, 1, 128)
    trace = Trace()
    it.model(torch.from_numpy(inputs), parse_name(CONFIG.shape, "L3-k2-t0.9"), trace=trace)
    assert 1.0 < record["mean_experts"] < 2.0
    assert record["mean_experts"] == pytest.approx(trace.mean_experts(), abs=1e-3)
    assert record["subnet"] == "L3-k2-t0.9"
    names = "step tokens loss balance grad_norm lr_scale layers subnet mean_experts"
    assert list(record) == names.split()


def test_bfloat16_rounds_products_and_leaves_the_rest_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact, low = awake(), awake(dtype="bfloat16")
    heads = []

    def watched(*args: Any, dtype: torch.dtype | None, **options: Any) -> HeadLoss:
        heads.append(dtype)
        return head_loss(*args, dtype=dtype, **options)

    monkeypatch.setattr(trainer_module, "head_loss", watched)
    seen = []
    for name, module in low.model.named_modules():
        if name.endswith("norm"):  # of layers, queries and keys, and the final one
            module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out, out)))
        elif name.endswith("gate"):
            router = module.weight
            module.register_forward_hook(
                lambda _m, args, out, w=router: seen.append((args[0], out, F.linear(args[0], w)))
            )
        elif isinstance(module, MoE):
            assert module.input_dtype == torch.bfloat16
        elif isinstance(module, Attention):
            assert module.attend is attend_bfloat16
        elif isinstance(module, Linear):
            assert module.multiply is multiply_bfloat16
    records = [it.train_step() for it in (exact, low)]
    assert heads == [None, torch.bfloat16]
    assert seen
    assert {x.dtype for three in seen for x in three} == {torch.float32}
    assert all(torch.equal(out, unrounded) for _, out, unrounded in seen)
    assert records[1]["loss"] == pytest.approx(records[0]["loss"], rel=2e-2)
    assert records[1]["loss"] != records[0]["loss"]
    for (name, a), (_, b) in zip(
        exact.model.named_parameters(), low.model.named_parameters(), strict=True
    ):
        assert b.dtype == torch.float32
        if b.grad is not None and name.endswith(("q_proj.weight", "down_proj", "tokens.weight")):
            assert b.grad.dtype == torch.float32
            assert 1e-4 < float((a.grad - b.grad).norm() / a.grad.norm()) < 0.2, name


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"distill": 0.5}, {"sandwich": True}, {"split": 0.5}],
    ids=["bfloat16", "distill", "sandwich", "split"],
)
def test_training_with_an_option_learns_in_full_and_reduced_networks(options: dict) -> None:
    config = replace(CONFIG, num_layers=3, num_experts=4, max_top_k=2)
    plan = replace(PLAN, stages=parse_stages("3x30x1x128"), adam_lr=0.02, decay_fraction=0.5)
    it = Trainer(config, replace(plan, sampling=SamplingPlan(), **options), stream())
    losses = [it.train_step()["loss"] for _ in range(30)]
    assert losses[0] > 3.5  # log 64 is 4.16
    inputs, targets = (torch.from_numpy(array) for array in it.stream.batch(0, 2, 128))
    for name in ("full", "k1", "w2"):
        logits = it.model(inputs, parse_name(config.shape, name)).detach()
        assert float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())) < 2.0, name
