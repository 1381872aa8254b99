"""The comparison with transformers would show each mistake that is easy to make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from elastic_moe_kernels import ops
from torch import Tensor

from elastic_moe.model.reference.layers import Attention, RMSNorm
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import ElasticTransformer
from elastic_moe.routing import Subnet
from tests.model.random_models import tokens
from tests.model.transformers_models import (
    ARCHITECTURES,
    VOCAB,
    assert_logits_agree,
    their_logits,
    their_model,
)

IDS = tokens(2, 80, vocab_size=VOCAB)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensor]:
    """A folder of each architecture, and the logits of transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = their_model(request.param)
    theirs.save_pretrained(folder)
    return folder, their_logits(theirs, IDS)


@pytest.fixture
def good(pair: tuple[Path, Tensor]) -> ElasticTransformer:
    """Our model of it, which agrees."""
    model = load_model(pair[0], dtype="float32")
    assert_logits_agree(our_logits(model), pair[1])
    return model


def our_logits(model: ElasticTransformer) -> Tensor:
    logits: Tensor = model(IDS, Subnet.full(model.shape))
    return logits


def assert_shown(model: ElasticTransformer, theirs: Tensor) -> None:
    """The mutant is not only seen, but by three times what is allowed."""
    ours = our_logits(model)
    assert ours.isfinite().all()
    assert (ours - theirs).abs().amax() > 3e-4 * theirs.abs().amax()


def modules(model: ElasticTransformer, kind: type) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, kind)]
    assert found
    return found


def skip_without(model: ElasticTransformer, trait: str) -> None:
    if not getattr(model.config, trait):
        pytest.skip(f"{model.config.model_type} has no {trait}")


NORMS = ["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"]


@pytest.mark.parametrize("norm", NORMS)
def test_norm_gains_ignored_would_show(
    norm: str, good: ElasticTransformer, pair: tuple[Path, Tensor]
) -> None:
    gains = [m for n, m in good.named_modules() if n.split(".")[-1] == norm]
    if good.config.qk_norm == "none" and norm in ("q_norm", "k_norm"):
        assert not any(isinstance(module, RMSNorm) for module in gains)
        return
    for module in gains:
        module.weight.fill_(1.0)
    assert_shown(good, pair[1])


def test_rope_style_swapped_would_show(good: ElasticTransformer, pair: tuple[Path, Tensor]) -> None:
    for attention in modules(good, Attention):
        attention.rope = "half" if attention.rope == "interleaved" else "interleaved"
    assert_shown(good, pair[1])


def test_renormalisation_flipped_would_show(
    good: ElasticTransformer, pair: tuple[Path, Tensor]
) -> None:
    for moe in modules(good, MoE):
        moe.renormalize = not moe.renormalize
    assert_shown(good, pair[1])


def test_router_input_rounded_to_bf16_would_show(
    good: ElasticTransformer, pair: tuple[Path, Tensor]
) -> None:
    for moe in modules(good, MoE):
        moe.gate.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16().float())
    assert_shown(good, pair[1])


def test_router_logits_rounded_to_bf16_would_show(
    good: ElasticTransformer, pair: tuple[Path, Tensor]
) -> None:
    for moe in modules(good, MoE):
        moe.gate.register_forward_hook(lambda _, __, logits: logits.bfloat16().float())
    assert_shown(good, pair[1])


def test_bias_ignored_would_show(good: ElasticTransformer, pair: tuple[Path, Tensor]) -> None:
    skip_without(good, "selection_bias")
    for moe in modules(good, MoE):
        moe.correction_bias.zero_()
    assert_shown(good, pair[1])


def test_bias_used_in_the_weights_would_show(
    good: ElasticTransformer, pair: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(good, "selection_bias")
    monkeypatch.setattr(ops, "route", biased_weights(ops.route))
    assert_shown(good, pair[1])


def biased_weights(route: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """The selection as it should be; the weights from score + bias."""

    def mutant(logits: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        ids, _ = route(logits, *rest, **options)
        scores = logits.softmax(-1) + options["correction_bias"]
        weights = scores.gather(1, ids.long())
        return ids, weights / weights.sum(-1, keepdim=True)

    return mutant


def test_shared_experts_left_out_would_show(
    good: ElasticTransformer, pair: tuple[Path, Tensor]
) -> None:
    skip_without(good, "shared_hidden")
    for moe in modules(good, MoE):
        moe.shared_experts = None
    assert_shown(good, pair[1])


def test_gate_and_up_swapped_would_show(
    good: ElasticTransformer, pair: tuple[Path, Tensor]
) -> None:
    for moe in modules(good, MoE):
        experts = moe.experts
        experts.gate_proj, experts.up_proj = experts.up_proj, experts.gate_proj
    assert_shown(good, pair[1])


def test_the_oracle_tells_sequences_and_positions_apart(pair: tuple[Path, Tensor]) -> None:
    """So that an agreement on all of them means something."""
    theirs = pair[1]
    assert theirs.shape == (2, 80, VOCAB)
    assert theirs.std() > 1
    assert (theirs[0] - theirs[1]).abs().amax(-1).min() > 1
    assert (theirs[:, 1:] - theirs[:, :-1]).abs().amax(-1).min() > 0.1
