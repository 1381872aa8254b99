"""Ranking channels leaves the network as it was, and gives width slices back what order lost."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastic_moe import Engine
from elastic_moe.errors import RequestError
from elastic_moe.lab.sweeps.quality import FullNetwork, measure_depths
from elastic_moe.lab.sweeps.text import EvaluationSet, evaluation_set, language_reference
from elastic_moe.model.checkpoints.extract import extract
from elastic_moe.model.reference.expert_ranking import rank_channels, reorder_channels
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.reference.transformer import ElasticTransformer
from elastic_moe.routing import Subnet, parse_name
from tests.model.random_models import TINY, assert_same, tiny_model, tokens

SHAPE = TINY.shape


def shuffled_order(model: ElasticTransformer, seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts, channels = model.shape.num_experts, model.shape.expert_hidden
    return {
        i: torch.stack([torch.randperm(channels, generator=generator) for _ in range(experts)])
        for i in range(model.shape.num_layers)
    }


def test_any_order_of_channels_is_the_same_network() -> None:
    model, other = tiny_model(), tiny_model()
    reorder_channels(other, shuffled_order(other))
    ids, full = tokens(2, 9), Subnet.full(SHAPE)
    assert_same(other(ids, full), model(ids, full))
    narrow = parse_name(SHAPE, "w2")
    assert not torch.allclose(other(ids, narrow), model(ids, narrow))


def test_the_order_is_that_of_the_contributions_of_each_channel() -> None:
    model = tiny_model()
    windows = [tokens(1, 20, seed=s)[0].tolist() for s in range(3)]
    order = rank_channels(model, windows)
    # By hand, for the first layer: its input depends on nothing that is routed.
    layer, total = model.layers[0], torch.zeros(SHAPE.num_experts, SHAPE.expert_hidden)
    full = Subnet.full(SHAPE)
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    run = layer.mlp.run_experts

    def listen(x: Tensor, ids: Tensor, weights: Tensor, *rest: object) -> Tensor:
        inputs.append((x, ids, weights))
        return run(x, ids, weights, *rest)

    layer.mlp.run_experts = listen
    for window in windows:
        model(torch.tensor([window]), full)
    for x, ids, weights in inputs:
        for t in range(len(x)):
            for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                if e >= 0:
                    gate = layer.mlp.experts.gate_proj[e] @ x[t]
                    hidden = torch.nn.functional.silu(gate) * (layer.mlp.experts.up_proj[e] @ x[t])
                    total[e] += weight * hidden.abs() * layer.mlp.experts.down_proj[e].norm(dim=0)
    assert torch.equal(order[0], total.argsort(dim=1, descending=True, stable=True))


def test_ranking_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    rank_channels(model, [tokens(1, 8)[0].tolist()])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert type(model.layers[0].mlp.run_experts).__name__ == "function"


def test_an_expert_that_no_token_chose_is_ordered_by_its_weights() -> None:
    model = tiny_model()
    model.layers[1].mlp.gate.weight[:] = 0.0  # ties: experts 0, 1 and 2 are always chosen
    order = rank_channels(model, [tokens(1, 8)[0].tolist()])
    experts = model.layers[1].mlp.experts
    size = experts.gate_proj[5].norm(dim=1) * experts.up_proj[5].norm(dim=1)
    size = size * experts.down_proj[5].norm(dim=0)
    assert torch.equal(order[1][5], size.argsort(descending=True, stable=True))


@pytest.mark.slow
def test_elastic_mini_with_shuffled_channels_recovers_its_curve(tmp_path: Path) -> None:
    """Random-free: the order that training gave is known, is destroyed, and comes back.

    On the first 12 of its layers, which it was trained to run alone, for the time that it takes.
    """
    with Engine.from_pretrained(
        extract("elastic-mini", "L12", tmp_path / "L12"), backend="reference"
    ) as engine:
        text = evaluation_set(language_reference(), engine.tokenizer, 1024)
        calibration = language_reference().text[-60_000:]  # far behind what is scored
        trained = width_losses(engine, text)
        reorder_channels(engine.runner.model, shuffled_order(engine.runner.model))
        shuffled = width_losses(engine, text)
        engine.rank_channels(calibration, tokens=2048)
        ranked = width_losses(engine, text)
    assert math.isclose(shuffled["full"], trained["full"], abs_tol=0.002)
    assert math.isclose(ranked["full"], trained["full"], abs_tol=0.002)
    for width in ("w4", "w2"):
        lost = shuffled[width] - trained[width]
        assert lost > 0.3
        assert ranked[width] - trained[width] < 0.25 * lost


def width_losses(engine: Engine, text: EvaluationSet) -> dict[str, float]:
    """Nats per token of three widths."""
    shape = engine.shape
    full = FullNetwork(text.scored_tokens, shape.vocab_size)
    losses: dict[str, float] = {}
    for name in ("full", "w4", "w2"):
        subnet = parse_name(shape, name)
        passes = measure_depths(
            engine.runner, text, subnet, [shape.num_layers], full, is_full=not losses
        )
        *_, (_, measured) = passes
        losses[name] = measured[shape.num_layers].nats_per_token
    return losses


def test_the_order_may_leave_with_an_extracted_checkpoint(tmp_path: Path) -> None:
    with Engine.from_pretrained("elastic-mini", dtype="float32", backend="reference") as engine:
        order = shuffled_order(engine.runner.model)
        child = extract("elastic-mini", "L3-w4", tmp_path / "child", channel_order=order)
        reorder_channels(engine.runner.model, order)
        ids = tokens(1, 20, vocab_size=4096)
        want = engine.runner.model(ids, parse_name(engine.shape, "L3-w4"))
    small = load_model(child, dtype="float32")
    got = small(ids, Subnet.full(small.shape))
    assert (got - want).abs().amax() <= 1e-4 * want.abs().amax()


def test_a_calibration_text_without_tokens_is_refused() -> None:
    with (
        Engine.from_pretrained("elastic-mini") as engine,
        pytest.raises(RequestError, match="calibration text has no tokens"),
    ):
        engine.rank_channels("")
