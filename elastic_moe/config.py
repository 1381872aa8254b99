"""Configurations of a sub-network, as requests, files and clients of remote APIs write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    AliasChoices,
    AliasGenerator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from elastic_moe.errors import RoutingError
from elastic_moe.routing import ModelShape, Subnet, parse_name, read_name, resolve, shorten
from elastic_moe.routing.axes import AXES, DEPTH, Axis, spellings

FALLBACKS = Literal["cache", "stream", "retry"]
# Keys of an answer's `routing` that tell of the run: accepted beside its `name`, without effect.
OF_ANSWERS = (
    *("model", "fingerprint", "active_params", "flops_per_token", "mean_experts"),
    *("profile", "limited"),
)
_TYPES: dict[str, Any] = {
    "count": int | list[int] | None,
    "real": float | list[float] | None,
    "set": int | list[int] | list[list[int]] | None,
}
# Argument of `resolve` -> field.
_AXIS_FIELDS = {axis.name: axis.client for axis in AXES} | {
    axis.members: axis.members for axis in AXES if axis.members is not None
}
_WIRE = {axis.client: axis.wire for axis in AXES}
_KEYS_OF = {field: spellings(argument) for argument, field in _AXIS_FIELDS.items()}


def _spellings(field: str) -> tuple[str, ...]:
    return _KEYS_OF.get(field) or tuple(dict.fromkeys((field, to_camel(field))))


def _choices(field: str) -> AliasChoices:
    return AliasChoices(*_spellings(field))


def _describe_spellings(schema: dict[str, Any]) -> None:
    """Add the other spellings to the JSON schema, which is generated from the fields."""
    known = schema["properties"]
    for first, field in list(known.items()):
        same = next((s for s in map(_spellings, [*_KEYS_OF, first]) if first in s), (first,))
        for spelling in same:
            known.setdefault(spelling, {**field, "description": f"another spelling of {first}"})
    for key in OF_ANSWERS:
        known[key] = {"description": "of an answer's routing that is given back: no effect"}


class _Config(BaseModel):
    model_config = ConfigDict(
        alias_generator=AliasGenerator(
            validation_alias=_choices,
            serialization_alias=lambda field: _WIRE.get(field, field),
        ),
        extra="forbid",
        frozen=True,
        strict=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",  # null would turn a wrong threshold into the full value
        json_schema_extra=_describe_spellings,
    )

    name: str | None = None
    max_depth: int | None = None
    model_id: str | None = None
    fallback_strategy: FALLBACKS | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_keys(cls, value: Any) -> Any:
        """Refuse two spellings of one field, and read an answer's `routing`."""
        if not isinstance(value, Mapping):
            return value
        given = dict(value)
        for field in cls.model_fields:
            written = [spelling for spelling in _spellings(field) if spelling in given]
            if len(written) > 1:
                raise PydanticCustomError(
                    "two_spellings",
                    "{first} and {second} are both given; keep one spelling",
                    {"first": written[0], "second": written[1]},
                )
        if given.get("name") is not None:  # it says all: nothing is taken from defaults
            for key in OF_ANSWERS:
                given.pop(key, None)
            absent = [*_AXIS_FIELDS.values(), "max_depth"]
        else:
            absent = [str(DEPTH.members)] if given.get(DEPTH.name) is not None else []
        for field in absent:
            if not any(spelling in given for spelling in _spellings(field)):
                given[field] = None
        return given

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

    def value(self, axis: Axis) -> Any:
        """What it says of an axis; None: the full value."""
        return getattr(self, axis.client)

    def with_value(self, axis: Axis, value: Any) -> Self:
        """A copy that says this of an axis."""
        return self.model_copy(update={axis.client: value})

    def resolve(self, shape: ModelShape) -> Subnet:
        """The sub-network of a model of this shape.

        Raises:
            RoutingError: a value does not fit the model, or not the name beside it; names field,
                value and allowed range.
        """
        values = {key: getattr(self, field) for key, field in _AXIS_FIELDS.items()}
        given = {key: value for key, value in values.items() if value is not None}
        if self.name is None:
            return resolve(shape, max_depth=self.max_depth, **given)
        named = read_name(shape, self.name)
        subnet = resolve(shape, max_depth=self.max_depth, **named)
        both = resolve(shape, **{**named, **given})
        if both != subnet:
            raise RoutingError(
                f"the name {shorten(self.name)} beside other values must mean the same, but with "
                f"them it is {shorten(both.name)}. Leave out the name, or change it alone."
            )
        return subnet


def _axis_fields() -> dict[str, Any]:
    """Field -> (type, default), as `create_model` takes them."""
    fields: dict[str, Any] = {}
    for axis in AXES:
        if axis.members is None:
            fields[axis.client] = (_TYPES[axis.kind], None)
        else:
            fields[axis.client], fields[axis.members] = (int | None, None), (list[int] | None, None)
    return fields


if TYPE_CHECKING:

    class RoutingConfig(_Config):
        """As below; its fields of axes exist at run time only, so read them by `value`."""

else:
    RoutingConfig = create_model(
        "RoutingConfig",
        __base__=_Config,
        __module__=__name__,
        __doc__="""The sub-network that a request asks for.

Every part that is absent or null means the model's full value.

Keys are those of an answer's `routing`. Every other spelling of an axis, and each in camelCase,
says the same. Two spellings of one key are an error. `name` beside other parts must
mean the same.""",
        **_axis_fields(),
    )


class ElasticRoutingConfig(RoutingConfig):
    """Depth, width, routing and client behaviour, as a client of a remote API writes them.

    `ElasticRoutingConfig()` has a vendor's defaults; start from `full()` to change single axes of
    the whole network. Every spelling of an axis is accepted, and so is an answer's `routing`;
    unknown keys are an error. Every elastic axis is one value, a list with one value per layer, or
    None for the model's full value. Ranges are checked against a model, by `resolve`.

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
        of any other axis, under its `client`: None by default.
        depth: in place of active_layers: the first so many run.
        name: of the sub-network; then everything absent is as the name says.
    """

    model_config = ConfigDict(
        alias_generator=AliasGenerator(validation_alias=_choices, serialization_alias=to_camel)
    )

    model_id: str = "ernie-5.1-prod"
    max_depth: int | None = 48
    active_layers: list[int] | None = Field(list(range(32)))
    expert_width: int | list[int] | None = 8
    routing_top_k: int | list[int] | None = 2
    sparsity_threshold: float | list[float] | None = 0.65
    fallback_strategy: FALLBACKS = "stream"
    expert_pool: int | list[int] | list[list[int]] | None = None
    min_experts: int | list[int] | None = 1
    depth: int | None = None

    @classmethod
    def full(cls, /, **changes: Any) -> Self:
        """The whole network of any model, with `changes` (any spelling) applied."""
        whole = {
            field: None
            for field in (*_AXIS_FIELDS.values(), "max_depth")
            if not any(spelling in changes for spelling in _spellings(field))
        }
        return cls.parse({**whole, **changes})

    @model_serializer(mode="wrap")
    def _leave_out(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `depth` and `name` unless they are given: remote APIs do not know them."""
        data: dict[str, Any] = write(self)
        return {k: v for k, v in data.items() if v is not None or k not in (DEPTH.name, "name")}


Routing = RoutingConfig | Subnet | str | None


def resolve_routing(shape: ModelShape, routing: Routing) -> Subnet:
    """The sub-network that a configuration, a name, a `Subnet` or None (the full network) means."""
    if routing is None:
        return resolve(shape)
    if isinstance(routing, str):
        return parse_name(shape, routing)
    if isinstance(routing, RoutingConfig):
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
        if item["type"] == "two_spellings":
            first, second = item["ctx"]["first"], item["ctx"]["second"]
            problems.append(f"{first} and {second} are both given. Keep one spelling.")
        elif item["type"] == "extra_forbidden":
            late = (DEPTH.name, "name")  # not of remote APIs
            allowed = ", ".join([*sorted({*model.model_fields} - {*late}), *late])
            unknown = shorten(where)
            problems.append(
                f"unknown key {unknown}; allowed are {allowed}, other spellings of the axes, and "
                f"each in camelCase."
            )
        else:
            problems.append(f"{where}: {item['msg']}, got {shorten(item['input'])}.")
    return " ".join(problems)
