"""ERNIE 4.5 MoE: interleaved rotary pairs, a bias on selection, shared experts, dense layers.

The bias decides which experts run, the unbiased scores how much each counts. The heads for
predicting several tokens at once (MTP) are not used.

Source: ERNIE 4.5 technical report, Baidu 2025; transformers' `ernie4_5_moe`.
"""

from __future__ import annotations

from typing import Any

from elastic_moe.errors import ExtractError
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families.attention import attention_sizes
from elastic_moe.model.families.config_keys import MAX_EXPERTS, MAX_LAYERS, ConfigKeys
from elastic_moe.model.families.elastic import read_elastic
from elastic_moe.model.families.family import Family


def _read(keys: ConfigKeys) -> ModelConfig:
    sizes = attention_sizes(keys, rms_norm_eps=1e-5, rope_theta=500000.0, tied=True)
    keys.no_window(sizes["max_positions"])
    last = sizes["num_layers"] - 1
    start = keys.integer("moe_layer_start_index", 1, least=0, most=MAX_LAYERS)
    end = keys.integer("moe_layer_end_index", -1, least=-1, most=MAX_LAYERS)
    interval = keys.integer("moe_layer_interval", 1, most=MAX_LAYERS)
    end = last if end == -1 else end
    dense = {i for i in range(last + 1) if (i + 1) % interval or not start <= i <= end}
    keys.get("intermediate_size")  # of dense layers; means nothing without one
    expert_hidden = keys.size("expert_hidden")
    shared = keys.size("shared_experts", 2, least=0, most=MAX_EXPERTS)
    return ModelConfig(
        model_type="ernie4_5_moe",
        **sizes,
        num_experts=keys.size("num_experts", most=MAX_EXPERTS),
        max_top_k=keys.size("max_top_k"),
        expert_hidden=expert_hidden,
        qk_norm="none",
        renormalize=True,
        routing_epsilon=keys.number("moe_norm_min", 1e-12),
        rope="interleaved",
        selection_bias=True,
        dense_layers=frozenset(dense),
        dense_hidden=keys.integer("intermediate_size") if dense else 0,
        shared_hidden=shared * expert_hidden,
        shared_experts=shared,
        elastic=read_elastic(keys),
    )


def _place_experts(config: ModelConfig) -> dict[str, Any]:
    """Layers that route must be every n-th one of a stretch; nothing else can be written down."""
    routing = sorted(config.moe_layers)
    if not routing:
        start = end = config.num_layers
        return _placement(start, end, 1)
    for interval in range(1, config.num_layers + 1):
        meant = [i for i in range(routing[0], routing[-1] + 1) if (i + 1) % interval == 0]
        if meant == routing:
            return _placement(routing[0], routing[-1], interval)
    raise ExtractError(
        f"layers {routing} of the {config.num_layers} that remain have experts, but an ERNIE 4.5 "
        f"configuration can only say that every n-th layer from one to another has. "
        f"Keep another set of layers."
    )


def _placement(start: int, end: int, interval: int) -> dict[str, Any]:
    return {
        "moe_layer_start_index": start,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
    }


ERNIE4_5_MOE = Family(
    title="ERNIE 4.5 MoE",
    architecture="Ernie4_5_MoeForCausalLM",
    read=_read,
    keys={
        "num_experts": ("moe_num_experts",),
        "max_top_k": ("moe_k",),
        "expert_hidden": ("moe_intermediate_size",),
        "shared_experts": ("moe_num_shared_experts",),
    },
    place_experts=_place_experts,
    selection_bias=(
        "mlp.moe_statics.e_score_correction_bias",
        "mlp.gate.moe_statics.e_score_correction_bias",
    ),
    ignored=("model.mtp_", "mtp_", "mtp."),
)
