"""Which model a run trains: a shape from sizes, a config.json, or a checkpoint to start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic_moe.errors import CheckpointError, OptionError
from elastic_moe.model.checkpoints.folder import CONFIG, find_checkpoint, read_json
from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.families import read_config

# The shape of the bundled super-network.
ELASTIC_MINI = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=4096,
    hidden_size=128,
    num_layers=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=16,
    max_top_k=4,
    expert_hidden=64,
    max_positions=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tied_embeddings=True,
    qk_norm="head",
    renormalize=True,
    elastic=ElasticBlock(width_granules=8),
)

DEFAULT_MODEL = "small"  # a quarter of elastic-mini's layers: minutes on a CPU suffice
MODELS = {DEFAULT_MODEL: replace(ELASTIC_MINI, num_layers=12), "elastic-mini": ELASTIC_MINI}
# Sizes that a user may set: name -> field of `ModelConfig`.
SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "experts": "num_experts",
    "top_k": "max_top_k",
    "expert_hidden": "expert_hidden",
    "granules": "width_granules",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "positions": "max_positions",
}


@dataclass(frozen=True, slots=True)
class Model:
    """What a run trains.

    Attributes:
        config: its configuration.
        raw: the config.json that says so; None for one made of sizes.
        start: the checkpoint that its first weights come from; None for random ones.
    """

    config: ModelConfig
    raw: Mapping[str, Any] | None = None
    start: str | None = None


def sized_model(name: str, sizes: Mapping[str, int], vocab_size: int) -> Model:
    """A named shape with other sizes.

    Args:
        sizes: those that differ, by field of `ModelConfig`.

    Raises:
        OptionError: they do not go together.
    """
    base = MODELS[name]
    changes: dict[str, Any] = dict(sizes)
    granules = changes.pop("width_granules", base.width_granules)
    if "hidden_size" in changes or "num_heads" in changes:
        hidden = changes.get("hidden_size", base.hidden_size)
        changes.setdefault("head_dim", hidden // changes.get("num_heads", base.num_heads))
    config = replace(
        base, **changes, vocab_size=vocab_size, elastic=ElasticBlock(width_granules=granules)
    )
    if config.num_heads % config.num_kv_heads:
        raise OptionError(
            f"--kv-heads must divide --heads {config.num_heads}, got {config.num_kv_heads}."
        )
    if config.head_dim % 2 or not config.head_dim:
        end = "." if "head_dim" in sizes else ", which is --hidden / --heads. Give --head-dim."
        raise OptionError(f"--head-dim must be even and at least 2, got {config.head_dim}{end}")
    if config.max_top_k > config.num_experts:
        raise OptionError(
            f"--top-k must be at most --experts {config.num_experts}, got {config.max_top_k}."
        )
    if config.expert_hidden % granules:
        raise OptionError(
            f"--granules must divide --expert-hidden {config.expert_hidden}, got {granules}."
        )
    return Model(config)


def model_from_file(path: Path) -> Model:
    """A new model of the configuration in a Hugging Face config.json, with random weights.

    What the file says of a training is about other weights, and left aside.

    Raises:
        OptionError: the file cannot be read, or its model cannot be trained.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it must hold a JSON object")
    except (OSError, ValueError) as error:
        raise OptionError(f"--config {path} cannot be read: {error}.") from None
    try:
        config = read_config(raw, f"--config {path}")
    except CheckpointError as error:
        raise OptionError(str(error)) from None
    _check_tied(config, f"--config {path}")
    elastic = ElasticBlock(width_granules=config.width_granules)
    return Model(replace(config, elastic=elastic), {**raw, "elastic_moe": elastic.to_json()})


def model_from_checkpoint(name: str) -> Model:
    """The model of a checkpoint, with its weights.

    Args:
        name: a bundled model, a folder, or an id in the Hugging Face cache.

    Raises:
        OptionError: there is none, or it cannot be trained.
    """
    try:
        folder = find_checkpoint(name)
        raw = read_json(folder, CONFIG)
        config = read_config(raw, str(folder / CONFIG))
    except CheckpointError as error:
        raise OptionError(f"--from: {error}") from None
    _check_tied(config, f"--from {name}")
    # Whatever the file says of the experts' width, the run says it again.
    elastic = config.elastic or ElasticBlock(width_granules=config.width_granules)
    raw = {**raw, "elastic_moe": elastic.to_json()}
    return Model(replace(config, elastic=elastic), raw, name)


def config_from_json(data: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a run's state holds, as `checkpoint.model_to_json` wrote it.

    Raises:
        ValueError, TypeError, KeyError: it holds something else.
    """
    elastic = data["elastic"]
    if elastic is not None:
        trained = {axis: tuple(values) for axis, values in elastic["trained"].items()}
        elastic = ElasticBlock(**{**elastic, "trained": trained})
    return ModelConfig(
        **{**data, "dense_layers": frozenset(data["dense_layers"]), "elastic": elastic}
    )


def _check_tied(config: ModelConfig, where: str) -> None:
    if not config.tied_embeddings:
        raise OptionError(
            f"{where}: tie_word_embeddings must be true, got false: training uses the embeddings "
            f"as the head, and a head of its own would stay random."
        )
