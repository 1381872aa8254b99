"""Checkpoints of transformers give the same logits here, and ours the same logits there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from elastic_moe.model.cache import KVCache
from elastic_moe.model.checkpoint import load_model
from elastic_moe.model.families import write_config
from elastic_moe.model.saving import save_checkpoint
from elastic_moe.model.transformer import ElasticTransformer
from elastic_moe.routing import Subnet
from tests.model.tiny import randomize, tiny_model, tokens

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True, "norm_topk_prob": True, "rope_theta": 10000.0},
    "untied": {"tie_word_embeddings": False, "norm_topk_prob": True, "rope_theta": 1e6},
    "not-renormalized": {"tie_word_embeddings": True, "norm_topk_prob": False, "rope_theta": 500.0},
    "untied-not-renormalized": {
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
    },
}
VOCAB = 211


def their_model(*, tie_word_embeddings: bool, norm_topk_prob: bool, rope_theta: float) -> Any:
    """A Qwen3-MoE of transformers whose gains, routing and logits are far from flat."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=160,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        max_position_embeddings=256,
        rms_norm_eps=1e-3,
        tie_word_embeddings=tie_word_embeddings,
        norm_topk_prob=norm_topk_prob,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    model = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        randomize(name, parameter.data, generator, std=0.1)
    return model.eval()


def assert_logits_agree(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest logit, which is far above what float32 leaves open."""
    assert theirs.std() > 1
    assert (ours - theirs).abs().amax() <= 1e-4 * theirs.abs().amax()


def greedy(model: ElasticTransformer, prompt: Tensor, count: int) -> list[int]:
    """`count` greedy tokens after prompt (1, T), through the KV cache."""
    subnet = Subnet.full(model.shape)
    cache = KVCache(model.shape.num_layers, capacity=prompt.shape[1] + count)
    ids, piece = [], prompt
    for _ in range(count):
        ids.append(int(model(piece, subnet, cache=cache)[0, -1].argmax()))
        piece = torch.tensor([ids[-1:]])
    return ids


@torch.no_grad()
def their_greedy(model: Any, prompt: Tensor, count: int) -> list[int]:
    """As `greedy`, without generation's defaults and without a cache."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_checkpoint_of_transformers_gives_its_logits_and_its_greedy_tokens(
    variant: Mapping[str, Any], tmp_path: Path
) -> None:
    theirs = their_model(**variant)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype="float32")
    assert ours.config.renormalize is variant["norm_topk_prob"]
    assert (ours.lm_head is None) is variant["tie_word_embeddings"]

    ids = tokens(2, 80, vocab_size=VOCAB)
    with torch.no_grad():
        want = theirs(ids).logits
    assert_logits_agree(ours(ids, Subnet.full(ours.shape)), want)
    assert greedy(ours, ids[:1, :64], 32) == their_greedy(theirs, ids[:1, :64], 32)


def test_transformers_rope_theta_is_read_from_the_old_key_too(tmp_path: Path) -> None:
    theirs = their_model(**VARIANTS["not-renormalized"])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["rope_theta"] = data.pop("rope_parameters")["rope_theta"]
    data["rope_scaling"] = None
    path.write_text(json.dumps(data), encoding="utf-8")
    assert load_model(tmp_path).config.rope_theta == 500.0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "as-they-are"])
def test_our_checkpoint_gives_our_logits_in_transformers(
    tied: bool, renormalize: bool, tmp_path: Path
) -> None:
    ours = tiny_model(
        dtype=torch.float32, tied_embeddings=tied, renormalize=renormalize, rope_theta=2000.0
    )
    config = write_config(ours.config, bos_id=0, eos_ids=[1, 4], pad_id=2)
    save_checkpoint(tmp_path, dict(ours.named_parameters()), config, dtype=torch.float32)
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs) is Qwen3MoeForCausalLM
    assert not any(loading.values()), loading  # nothing missing, unexpected or misshaped
    ids = tokens(2, 70)
    with torch.no_grad():
        want = theirs(ids).logits
    assert_logits_agree(ours(ids, Subnet.full(ours.shape)), want)
