"""The architectures whose checkpoints load: config.json in, `ModelConfig` and tensor names out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_moe.errors import CheckpointError
from elastic_moe.model.checkpoints.config_keys import ConfigKeys
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families.ernie4_5_moe import ERNIE4_5_MOE
from elastic_moe.model.families.family import EXPERT_PARTS, Family, Source, parameter_shapes
from elastic_moe.model.families.mixtral import MIXTRAL
from elastic_moe.model.families.olmoe import OLMOE
from elastic_moe.model.families.qwen3_moe import QWEN3_MOE, write_config
from elastic_moe.routing import shorten

FAMILIES: dict[str, Family] = {
    "ernie4_5_moe": ERNIE4_5_MOE,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
}

__all__ = [
    "EXPERT_PARTS",
    "FAMILIES",
    "Family",
    "Source",
    "parameter_shapes",
    "read_config",
    "write_config",
]


def read_config(data: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration that a parsed config.json means.

    Args:
        data: the parsed file.
        where: its path, for messages.

    Raises:
        CheckpointError: an unknown architecture, a missing or ill-typed key, sizes that do not go
            together, or a key whose value changes the mathematics in a way that is not implemented.
    """
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {shorten(model_type)}, which is not supported. "
            f"Supported: {', '.join(FAMILIES)}."
        )
    family, keys = FAMILIES[model_type], ConfigKeys(data, where)
    config = family.read(keys)
    _check_sizes(config, family, where)
    keys.finish()
    return config


def _check_sizes(config: ModelConfig, family: Family, where: str) -> None:
    """Refuse sizes that do not go together."""
    heads, groups = config.num_heads, config.num_kv_heads
    granules = config.width_granules
    experts, top_k, hidden = (
        next(key for key in family.size_keys[field])
        for field in ("num_experts", "max_top_k", "expert_hidden")
    )
    wrong = {
        f"num_key_value_heads {groups} must divide num_attention_heads {heads}": heads % groups,
        f"head_dim {config.head_dim} must be even and at least 2": (
            config.head_dim % 2 or not config.head_dim
        ),
        f"{top_k} {config.max_top_k} must be at most {experts} {config.num_experts}": (
            config.max_top_k > config.num_experts
        ),
        f"elastic_moe.width_granules {granules} must divide {hidden} {config.expert_hidden}": (
            config.expert_hidden % granules
        ),
        f"head_dim {config.head_dim} must be hidden_size / num_attention_heads = "
        f"{config.hidden_size / heads:g} where one norm spans all heads": (
            config.qk_norm == "all" and config.head_dim * heads != config.hidden_size
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise CheckpointError(f"{where}: {message}.")
