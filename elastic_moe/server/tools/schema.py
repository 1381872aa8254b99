"""JSON schemas that force generated text to be calls of a request's functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from elastic_moe.protocol.tools import Function

MAX_CALLS = 16  # in one answer: an untrained model would never stop
# Keys of a schema that hold a schema, or a list of them; and those that hold schemas by name.
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
# Keys by which several schemas describe one object, so that none lists all its properties.
_COMBINING = frozenset(("not", "if", "dependentSchemas", "unevaluatedProperties"))
_COMBINING_PROPERTIES = frozenset(("allOf", "anyOf", "oneOf", "$ref"))
_OPEN = frozenset(("additionalProperties", "patternProperties", "minProperties"))


def arguments_schema(function: Function, place: str = "#") -> dict[str, Any]:
    """Schema of a function's arguments.

    Where a schema lists properties and does not mention others, others are forbidden: the result
    is still valid, and small models would add keys without end.

    Args:
        place: JSON pointer of the schema in the final document, for its own references.
    """
    schema: dict[str, Any] = deepcopy(function.parameters or {"properties": {}})
    schema.setdefault("type", "object")
    inside = list(_schemas(schema))
    closed = not any(map(_is_combined, inside))
    for own in inside:
        reference = own.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            own["$ref"] = place + reference[1:]
        if closed and _lists_all_properties(own):
            own["additionalProperties"] = False
    return schema


def calls_schema(functions: Sequence[Function], *, parallel: bool) -> dict[str, Any]:
    """Schema of a call as JSON, or of a list of calls: {"name": ..., "arguments": {...}}."""
    call: dict[str, Any] = {
        "anyOf": [_call(function, number) for number, function in enumerate(functions)]
    }
    schema = call
    if parallel:
        schema = {"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": call}
    definitions = {
        str(number): arguments_schema(function, f"#/$defs/{number}")
        for number, function in enumerate(functions)
    }
    return {**schema, "$defs": definitions}


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
    """A schema and all schemas inside it; the same for a list of them."""
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


def _is_combined(schema: Mapping[str, Any]) -> bool:
    """Whether several schemas describe one object."""
    parts = schema.get("allOf", ())
    return (
        bool(_COMBINING & schema.keys())
        or ("properties" in schema and bool(_COMBINING_PROPERTIES & schema.keys()))
        or (isinstance(parts, list) and len(parts) > 1)
    )


def _lists_all_properties(schema: Mapping[str, Any]) -> bool:
    """Whether a schema lists every property that its object needs."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, dict)
        and not _OPEN & schema.keys()
        and isinstance(required, list)
        and all(name in properties for name in required)
    )
