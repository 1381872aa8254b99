"""The architectures whose checkpoints load: config.json in, `ModelConfig` and tensor names out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_moe.errors import CheckpointError
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families.config_keys import ConfigKeys
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
    family = FAMILIES[model_type]
    keys = ConfigKeys(data, where, names=family.all_keys)
    config = family.read(keys)
    _check_sizes(config, keys)
    keys.finish()
    return config


def _check_sizes(config: ModelConfig, keys: ConfigKeys) -> None:
    """Refuse sizes that do not go together."""
    heads, groups = config.num_heads, config.num_kv_heads
    granules = config.width_granules

    def said(field: str) -> str:
        return f"{keys.key(field)} {getattr(config, field)}"

    wrong = {
        f"{said('num_kv_heads')} must divide {said('num_heads')}": heads % groups,
        f"{said('head_dim')} must be even and at least 2": (
            config.head_dim % 2 or not config.head_dim
        ),
        f"{said('max_top_k')} must be at most {said('num_experts')}": (
            config.max_top_k > config.num_experts
        ),
        f"elastic_moe.width_granules {granules} must divide {said('expert_hidden')}": (
            config.expert_hidden % granules
        ),
        f"{said('head_dim')} must be {keys.key('hidden_size')} / {keys.key('num_heads')} = "
        f"{config.hidden_size / heads:g} where one norm spans all heads": (
            config.qk_norm == "all" and config.head_dim * heads != config.hidden_size
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise CheckpointError(f"{keys.where}: {message}.")
