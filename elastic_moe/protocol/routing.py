"""A request's sub-network on the wire: `routing_config`, and what was applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from elastic_moe.errors import RoutingError
from elastic_moe.protocol.base import Answer, Body
from elastic_moe.routing import Subnet
from elastic_moe.routing.axes import AXES, DEPTH, PER_LAYER, count

# Spellings of one knob, besides each one's camelCase: those of `ElasticRoutingConfig`.
_SYNONYMS = {"top_k": "routing_top_k", "sparsity": "sparsity_threshold"}


def _spellings() -> dict[str, str]:
    """Key as written -> field."""
    table = {}
    for name in RoutingConfig.model_fields:
        for spelling in (name, *([_SYNONYMS[name]] if name in _SYNONYMS else [])):
            table[spelling] = table[to_camel(spelling)] = name
    return table


def _tell_spellings(schema: dict[str, Any]) -> None:
    """Add the other spellings to the JSON schema, which is generated from the fields."""
    fields = schema["properties"]
    for spelling, name in _spellings().items():
        if spelling not in fields:
            fields[spelling] = {**fields[name], "description": f"another spelling of {name}"}


class RoutingConfig(Body):
    """The sub-network that a request asks for.

    Every part that is absent or null means the model's full value.

    Keys may be written in camelCase, and as in `ElasticRoutingConfig`: routing_top_k for top_k,
    sparsity_threshold for sparsity. Two spellings of one knob are an error.

    Attributes:
        depth: the first so many layers run.
        active_layers: or these do, ascending.
        top_k: experts per token, at most.
        sparsity: drops selected experts whose score is below this x the token's best.
        expert_width: granules of each expert's hidden channels.
        expert_pool: how many experts, or which, may be chosen.
        min_experts: experts per token that sparsity never drops.
        max_depth: layers of the model that this was written for.
        model_id, fallback_strategy: concern clients, and have no effect.
    """

    model_config = ConfigDict(json_schema_extra=_tell_spellings)

    depth: int | None = None
    active_layers: list[int] | None = None
    top_k: int | list[int] | None = None
    sparsity: float | list[float] | None = None
    expert_width: int | list[int] | None = None
    expert_pool: int | list[int] | list[list[int]] | None = None
    min_experts: int | list[int] | None = None
    max_depth: int | None = None
    model_id: str | None = None
    fallback_strategy: Literal["cache", "stream", "retry"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        """Bring every key to the spelling of the fields."""
        if not isinstance(value, Mapping):
            return value
        known = _spellings()
        given: dict[str, str] = {}
        for key in value:
            name = known.get(str(key), str(key))
            if name in given:
                raise ValueError(f"{given[name]} and {key} are both given; keep one spelling")
            given[name] = key
        return {known.get(str(key), str(key)): part for key, part in value.items()}

    @model_validator(mode="after")
    def _one_depth(self) -> RoutingConfig:
        if self.depth is not None and self.active_layers is not None:
            raise ValueError("depth and active_layers are both given; keep one of them")
        return self

    def knobs(self, num_layers: int) -> dict[str, Any]:
        """Keywords of `ElasticRoutingConfig.full`, for a model of so many layers.

        Raises:
            RoutingError: it has not as many as `depth` says.
        """
        layers = self.active_layers
        if self.depth is not None:
            if not 1 <= self.depth <= num_layers:
                raise RoutingError(
                    f"depth must be in [1, {num_layers}], got {self.depth}. Leave it out for all "
                    f"layers."
                )
            layers = list(range(self.depth))
        return {
            "max_depth": self.max_depth,
            "active_layers": layers,
            "routing_top_k": self.top_k,
            "sparsity_threshold": self.sparsity,
            "expert_width": self.expert_width,
            "expert_pool": self.expert_pool,
            "min_experts": self.min_experts,
        }


def values(subnet: Subnet) -> dict[str, Any]:
    """A sub-network's values by their keys in answers: a `routing_config` of it.

    One value, or where layers differ one for each of the model's layers. A pool is a count, or a
    list of ids.
    """
    answer: dict[str, Any] = {
        DEPTH.wire: subnet.depth,
        str(DEPTH.members): list(subnet.active_layers),
    }
    for axis in PER_LAYER:
        column = subnet.column(axis.name)
        if any(value != column[0] for value in column):
            answer[axis.wire] = [list(v) if isinstance(v, tuple) else v for v in column]
        elif isinstance(column[0], tuple) and column[0] != tuple(range(len(column[0]))):
            answer[axis.wire] = list(column[0])
        else:
            answer[axis.wire] = count(column[0])
    return answer


def changes(asked: Subnet, applied: Subnet) -> dict[str, tuple[Any, Any]]:
    """Axis -> (value requested, value that runs), where these differ."""
    before, after = values(asked), values(applied)
    return {
        axis.wire: (before[axis.wire], after[axis.wire])
        for axis in AXES
        if before[axis.wire] != after[axis.wire]
    }


class Limited(Answer):
    """An axis on which something else ran than was asked for."""

    asked: int | float | list[Any]
    applied: int | float | list[Any]


class AppliedRouting(Answer):
    """The sub-network that ran, and what it cost.

    Attributes:
        name: such as L24-k2; `full` for the whole network.
        model: the checkpoint's true name, whatever name was asked for.
        top_k, expert_width, sparsity, expert_pool: one value, or one per layer where they differ.
        active_params: parameters that a token uses at most.
        flops_per_token: at the request's mean context, with the measured mean_experts.
        mean_experts: experts that really ran, per token and active layer.
        profile: that was asked for, if any.
        limited: axis -> what was asked for and what ran, where the server's limits changed it.
    """

    name: str
    model: str
    depth: int
    active_layers: list[int]
    top_k: int | list[int]
    expert_width: int | list[int]
    sparsity: float | list[float]
    expert_pool: int | list[int] | list[list[int]]
    min_experts: int | list[int]
    active_params: int
    flops_per_token: float = Field(description="2 per multiply-add; norms, router, head counted")
    mean_experts: float
    profile: str | None = None
    limited: dict[str, Limited] | None = None
