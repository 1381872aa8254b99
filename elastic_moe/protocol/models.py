"""/v1/models."""

from __future__ import annotations

from typing import Any, Literal

from elastic_moe.protocol.base import Answer


class ElasticAxes(Answer):
    """The range of each elastic axis.

    Attributes:
        max_depth: number of layers.
        max_top_k: experts per token at most.
        num_experts: routed experts of a layer.
        width_granules: width of an expert in granules.
        trained: axis -> the values that the checkpoint was trained for; empty if unknown.
        profiles: names for `profile`, or after '@' in the model's name.
    """

    max_depth: int
    max_top_k: int
    num_experts: int
    width_granules: int
    trained: dict[str, list[Any]]
    profiles: list[str]


class ModelCard(Answer):
    """A model name that requests may use.

    Attributes:
        root: the checkpoint's own name.
        max_model_len: most tokens of prompt and answer together.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["elastic-moe"] = "elastic-moe"
    root: str
    max_model_len: int
    elastic: ElasticAxes


class ModelList(Answer):
    """All model names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
