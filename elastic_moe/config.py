"""The configuration object of remote elastic APIs, and how it resolves against a local model."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from elastic_moe.errors import RoutingError
from elastic_moe.routing import ModelShape, Subnet, parse_name, resolve, shorten


class ElasticRoutingConfig(BaseModel):
    """Depth, width, routing and client behaviour, as a client of a remote API writes them.

    `ElasticRoutingConfig()` has a vendor's defaults; start from `full()` to change single axes of
    the whole network. Keys in snake_case and camelCase are accepted; unknown keys are an error.
    Every elastic axis is one value, a list with one value per layer, or None for the model's full
    value. Ranges are checked against a model, by `resolve`.

    Attributes:
        model_id: for clients; resolving ignores it.
        max_depth: layers of the model that this was written for, or None.
        active_layers: layers that run, ascending.
        expert_width: granules of each expert's hidden channels.
        routing_top_k: experts per token.
        sparsity_threshold: drops selected experts whose score is below this x the token's best.
        fallback_strategy: for clients; resolving ignores it.
        expert_pool: how many experts, or which, may be chosen.
        min_experts: experts per token that the threshold never drops.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",  # null would turn a wrong threshold into the full value
    )

    model_id: str = "ernie-5.1-prod"
    max_depth: int | None = 48
    active_layers: list[int] | None = list(range(32))
    expert_width: int | list[int] | None = 8
    routing_top_k: int | list[int] | None = 2
    sparsity_threshold: float | list[float] | None = 0.65
    fallback_strategy: Literal["cache", "stream", "retry"] = "stream"
    expert_pool: int | list[int] | list[list[int]] | None = None
    min_experts: int | list[int] | None = 1

    @classmethod
    def full(cls, /, **changes: Any) -> Self:
        """The whole network of any model, with `changes` (either spelling) applied."""
        clients = {"model_id", "fallback_strategy"}
        whole = {
            name: None
            for name in cls.model_fields
            if name not in clients and to_camel(name) not in changes
        }
        return cls.parse({**whole, **changes})

    @classmethod
    def parse(cls, value: Any) -> Self:
        """As `model_validate`, but a wrong key or type raises `RoutingError`."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise RoutingError(_explain(error, cls)) from None

    @classmethod
    def parse_json(cls, text: str | bytes) -> Self:
        """As `model_validate_json`, but a wrong key or type raises `RoutingError`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RoutingError(_explain(error, cls)) from None

    def resolve(self, shape: ModelShape) -> Subnet:
        """The sub-network of a model of this shape.

        Raises:
            RoutingError: a value does not fit the model; names field, value and allowed range.
        """
        return resolve(
            shape,
            max_depth=self.max_depth,
            active_layers=self.active_layers,
            top_k=self.routing_top_k,
            min_experts=self.min_experts,
            expert_width=self.expert_width,
            sparsity_threshold=self.sparsity_threshold,
            expert_pool=self.expert_pool,
        )


Routing = ElasticRoutingConfig | Subnet | str | None


def resolve_routing(shape: ModelShape, routing: Routing) -> Subnet:
    """The sub-network that a configuration, a name, a `Subnet` or None (the full network) means."""
    if routing is None:
        return resolve(shape)
    if isinstance(routing, str):
        return parse_name(shape, routing)
    if isinstance(routing, ElasticRoutingConfig):
        return routing.resolve(shape)
    if not isinstance(routing, Subnet):
        raise RoutingError(
            f"routing must be an ElasticRoutingConfig, a Subnet, a name such as 'L36-k2' or None, "
            f"got {type(routing).__name__}."
        )
    if routing.shape != shape:
        raise RoutingError(
            f"sub-network {routing.name!r} belongs to a model of another shape "
            f"({routing.shape.num_layers} layers, {routing.shape.num_experts} experts). "
            f"Resolve its configuration against this model."
        )
    return routing


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden" and where in model.model_fields:
            problems.append(f"{where} and {to_camel(where)} are both given. Keep one spelling.")
        elif item["type"] == "extra_forbidden":
            allowed = ", ".join(sorted(model.model_fields))
            unknown = shorten(where)
            problems.append(f"unknown key {unknown}; allowed are {allowed}, or their camelCase.")
        else:
            problems.append(f"{where}: {item['msg']}, got {shorten(item['input'])}.")
    return " ".join(problems)
