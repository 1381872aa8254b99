"""OLMoE: one norm over all query heads and one over all key heads; weights as the softmax gives.

Source: OLMoE, arXiv:2409.02060.
"""

from __future__ import annotations

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families.attention import attention_sizes
from elastic_moe.model.families.config_keys import MAX_EXPERTS, ConfigKeys
from elastic_moe.model.families.elastic import read_elastic
from elastic_moe.model.families.family import Family


def _read(keys: ConfigKeys) -> ModelConfig:
    sizes = attention_sizes(keys, rms_norm_eps=1e-5, rope_theta=10000.0)
    keys.no_window(sizes["max_positions"])
    return ModelConfig(
        model_type="olmoe",
        **sizes,
        num_experts=keys.size("num_experts", most=MAX_EXPERTS),
        max_top_k=keys.size("max_top_k"),
        expert_hidden=keys.size("expert_hidden"),
        qk_norm="all",
        renormalize=keys.flag("norm_topk_prob", False),
        elastic=read_elastic(keys),
    )


OLMOE = Family(
    title="OLMoE",
    architecture="OlmoeForCausalLM",
    read=_read,
    keys={
        "num_experts": ("num_experts",),
        "max_top_k": ("num_experts_per_tok",),
        "expert_hidden": ("intermediate_size",),
    },
)
