"""Small random checkpoints of transformers, one for each architecture: far from flat everywhere.

    python -m tests.model.transformers_models NAME FOLDER

writes one with elastic-mini's tokenizer, for `elastic-moe info FOLDER` and `generate FOLDER`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from elastic_moe.model.checkpoints.folder import BUNDLED

VOCAB = 211
# Ends of the names of routers' weights in transformers.
ROUTERS = ("mlp.gate.weight",)
# Every size differs from every other that it could be mistaken for.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def qwen3_moe(**changes: Any) -> Any:
    """Norms on each head, a dense layer, weights renormalised, head of its own."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{
                **_COMMON,
                **_rope(1e6),
                "hidden_size": 160,
                "head_dim": 24,
                "intermediate_size": 56,
                "mlp_only_layers": [2],
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 40,
                "tie_word_embeddings": False,
                "norm_topk_prob": True,
                **changes,
            }
        )
    )


def olmoe(**changes: Any) -> Any:
    """Norms over all heads, weights as the softmax gives them."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            **{
                **_COMMON,
                **_rope(10000.0),
                "hidden_size": 144,
                "intermediate_size": 40,
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "norm_topk_prob": False,
                **changes,
            }
        )
    )


def mixtral(**changes: Any) -> Any:
    """No norms on queries and keys."""
    return MixtralForCausalLM(
        MixtralConfig(
            **{
                **_COMMON,
                **_rope(5000.0),
                "hidden_size": 144,
                "head_dim": 20,
                "intermediate_size": 40,
                "num_local_experts": 8,
                "num_experts_per_tok": 3,
                **changes,
            }
        )
    )


def ernie4_5_moe(**changes: Any) -> Any:
    """Interleaved pairs, a bias on selection, shared experts, a dense first layer."""
    return Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(
            **{
                **_COMMON,
                **_rope(500.0),
                "hidden_size": 144,
                "intermediate_size": 56,
                "moe_num_experts": 8,
                "moe_k": 3,
                "moe_intermediate_size": 40,
                "moe_num_shared_experts": 2,
                "tie_word_embeddings": True,
                **changes,
            }
        )
    )


ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "mixtral": mixtral,
    "ernie4_5_moe": ernie4_5_moe,
}


def their_model(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers: gains from U(0.5, 1.5), matrices from N(0, 0.1), routers wider."""
    model = ARCHITECTURES[architecture](**changes)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        weight = parameter.data
        if name.endswith("e_score_correction_bias"):
            weight.normal_(std=0.15, generator=generator)
        elif weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            router = name.endswith(ROUTERS)
            weight.normal_(std=0.15 if router else 0.1, generator=generator)
    assert any(name.endswith(ROUTERS) for name, _ in model.named_parameters()), (
        f"no parameter of {architecture} ends in {ROUTERS}: add the name of its router to ROUTERS"
    )
    return model.eval()


def save_with_tokenizer(architecture: str, folder: Path) -> None:
    """A checkpoint that `elastic-moe generate` runs, with elastic-mini's tokenizer."""
    their_model(architecture, vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / "elastic-mini" / name, folder / name)


@torch.no_grad()
def their_logits(model: Any, ids: Tensor) -> Tensor:
    """ids (B, T) -> logits (B, T, V)."""
    logits: Tensor = model(ids).logits
    return logits


@torch.no_grad()
def their_greedy(model: Any, prompt: Tensor, count: int) -> list[int]:
    """`count` greedy tokens after prompt (1, T), without a cache."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, prompt.shape[1] :].tolist()


def assert_logits_agree(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest logit, which is far above what float32 leaves open."""
    assert theirs.std() > 1
    assert (ours - theirs).abs().amax() <= 1e-4 * theirs.abs().amax()


if __name__ == "__main__":
    save_with_tokenizer(sys.argv[1], Path(sys.argv[2]))
