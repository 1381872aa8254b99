"""Mixtral: no norms on queries and keys; weights renormalised over the chosen experts.

Source: Mixtral of Experts, arXiv:2401.04088.
"""

from __future__ import annotations

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families.attention import attention_sizes
from elastic_moe.model.families.config_keys import MAX_EXPERTS, ConfigKeys
from elastic_moe.model.families.elastic import read_elastic
from elastic_moe.model.families.family import Family


def _read(keys: ConfigKeys) -> ModelConfig:
    sizes = attention_sizes(keys, rms_norm_eps=1e-5, rope_theta=1e6)
    keys.no_window(sizes["max_positions"])
    return ModelConfig(
        model_type="mixtral",
        **sizes,
        num_experts=keys.size("num_experts", most=MAX_EXPERTS),
        max_top_k=keys.size("max_top_k"),
        expert_hidden=keys.size("expert_hidden"),
        qk_norm="none",
        renormalize=True,
        elastic=read_elastic(keys),
    )


MIXTRAL = Family(
    title="Mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    keys={
        "num_experts": ("num_local_experts",),
        "max_top_k": ("num_experts_per_tok",),
        "expert_hidden": ("intermediate_size",),
    },
    names={"mlp.": "block_sparse_moe."},
    parts=("w1", "w3", "w2"),
)
