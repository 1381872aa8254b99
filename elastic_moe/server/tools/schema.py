"""JSON schemas of calls: what a text must be so that it calls a function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from elastic_moe.protocol.tools import Function

MAX_CALLS = 16  # of one answer: random weights find no end
# Keys of a schema whose values are schemas, lists of them, or have them by name.
_NESTED = frozenset(
    [
        "items",
        "additionalItems",
        "additionalProperties",
        "prefixItems",
        "contains",
        "propertyNames",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "if",
        "then",
        "else",
        "unevaluatedItems",
        "unevaluatedProperties",
    ]
)
_BY_NAME = frozenset(
    ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
)
# Where an object is described in several places, none of them names all of its keys.
_JOINS = frozenset(("not", "if", "dependentSchemas", "unevaluatedProperties"))
_JOINS_PROPERTIES = frozenset(("allOf", "anyOf", "oneOf", "$ref"))
_OPEN = frozenset(("additionalProperties", "patternProperties", "minProperties"))


def arguments_schema(function: Function, place: str = "#") -> dict[str, Any]:
    """Schema of a function's arguments.

    Objects whose schema names their properties and says nothing of others have no others: what is
    written is still allowed, and small models find no end in keys of their own.

    Args:
        place: where the schema will stand, as its references to itself must say.
    """
    schema: dict[str, Any] = deepcopy(function.parameters or {"properties": {}})
    schema.setdefault("type", "object")
    inside = list(_schemas(schema))
    closed = not any(map(_joins, inside))
    for own in inside:
        reference = own.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            own["$ref"] = place + reference[1:]
        if closed and _names_all(own):
            own["additionalProperties"] = False
    return schema


def calls_schema(functions: Sequence[Function], *, several: bool) -> dict[str, Any]:
    """Schema of a call as JSON, or of a list of calls: {"name": ..., "arguments": {...}}."""
    one: dict[str, Any] = {
        "anyOf": [_call(function, number) for number, function in enumerate(functions)]
    }
    schema = one
    if several:
        schema = {"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": one}
    own = {
        str(number): arguments_schema(function, f"#/$defs/{number}")
        for number, function in enumerate(functions)
    }
    return {**schema, "$defs": own}


def _call(function: Function, number: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": {"$ref": f"#/$defs/{number}"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema that a schema, or a list of them, has inside, itself included."""
    if isinstance(schema, list):
        for one in schema:
            yield from _schemas(one)
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in _NESTED:
            yield from _schemas(value)
        elif key in _BY_NAME and isinstance(value, dict):
            yield from _schemas(list(value.values()))


def _joins(schema: Mapping[str, Any]) -> bool:
    """Whether this describes an object together with another schema."""
    parts = schema.get("allOf", ())
    return (
        bool(_JOINS & schema.keys())
        or ("properties" in schema and bool(_JOINS_PROPERTIES & schema.keys()))
        or (isinstance(parts, list) and len(parts) > 1)
    )


def _names_all(schema: Mapping[str, Any]) -> bool:
    """Whether an object can do with the properties that its schema names."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, dict)
        and not _OPEN & schema.keys()
        and isinstance(required, list)
        and all(name in properties for name in required)
    )
