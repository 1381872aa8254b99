"""Qwen3-MoE: a norm on every query and key head; dense layers where the configuration says so.

Source: Qwen3 technical report, arXiv:2505.09388.
"""

from __future__ import annotations

from typing import Any

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families.attention import attention_sizes
from elastic_moe.model.families.config_keys import MAX_EXPERTS, MAX_LAYERS, ConfigKeys
from elastic_moe.model.families.elastic import read_elastic
from elastic_moe.model.families.family import Family


def _read(keys: ConfigKeys) -> ModelConfig:
    sizes = attention_sizes(keys, rms_norm_eps=1e-6, rope_theta=10000.0)
    keys.no_window(sizes["max_positions"], switch="use_sliding_window")
    layers = range(sizes["num_layers"])
    step = keys.integer("decoder_sparse_step", 1, most=MAX_LAYERS)
    dense = keys.layers("mlp_only_layers", len(layers)) | {i for i in layers if (i + 1) % step}
    keys.get("intermediate_size")  # of dense layers; means nothing without one
    return ModelConfig(
        model_type="qwen3_moe",
        **sizes,
        num_experts=keys.size("num_experts", most=MAX_EXPERTS),
        max_top_k=keys.size("max_top_k"),
        expert_hidden=keys.size("expert_hidden"),
        qk_norm="head",
        renormalize=keys.flag("norm_topk_prob", False),
        dense_layers=frozenset(dense),
        dense_hidden=keys.integer("intermediate_size") if dense else 0,
        elastic=read_elastic(keys),
    )


def _place_experts(config: ModelConfig) -> dict[str, Any]:
    return {"mlp_only_layers": sorted(config.dense_layers), "decoder_sparse_step": 1}


QWEN3_MOE = Family(
    title="Qwen3-MoE",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    keys={
        # transformers 5 writes the second key.
        "num_experts": ("num_experts", "num_local_experts"),
        "max_top_k": ("num_experts_per_tok",),
        "expert_hidden": ("moe_intermediate_size",),
    },
    place_experts=_place_experts,
)


def write_config(
    config: ModelConfig, *, bos_id: int, eos_ids: list[int], pad_id: int
) -> dict[str, Any]:
    """The config.json of a Qwen3-MoE checkpoint that transformers loads unchanged."""
    data: dict[str, Any] = {
        "architectures": [QWEN3_MOE.architecture],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_hidden or config.expert_hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.max_top_k,
        "moe_intermediate_size": config.expert_hidden,
        "norm_topk_prob": config.renormalize,
        **_place_experts(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids,
        "pad_token_id": pad_id,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    if config.elastic is not None:
        data["elastic_moe"] = config.elastic.to_json()
    return data
