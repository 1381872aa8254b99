"""Schemas of calls: references still point home, and objects have an end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elastic_moe import SamplingParams
from elastic_moe.engine import Engine
from elastic_moe.protocol.tools import Function
from elastic_moe.server.tools.schema import arguments_schema, calls_schema

YES = {"type": "boolean"}
A = {"type": "object", "properties": {"a": YES}, "required": ["a"]}
B = {"properties": {"b": YES}, "required": ["b"]}


def function(parameters: dict[str, Any] | None) -> Function:
    return Function(name="f", parameters=parameters)


def closed(parameters: dict[str, Any] | None) -> bool:
    return arguments_schema(function(parameters)).get("additionalProperties") is False


def test_an_object_that_names_its_properties_has_no_others() -> None:
    assert closed(None)
    assert closed({"properties": {}})
    assert closed(A)
    inside = arguments_schema(function({"properties": {"list": {"items": A}}, "$defs": {"B": B}}))
    assert inside["properties"]["list"]["items"]["additionalProperties"] is False
    assert inside["$defs"]["B"]["additionalProperties"] is False
    assert "additionalProperties" not in A  # what was asked is not changed


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "patternProperties": {"^x": YES}},
        {**A, "minProperties": 2},
        {**A, "required": ["a", "c"]},
        {"allOf": [A, B], **A},
        {**A, "anyOf": [B, {"required": ["a"]}]},
        {**A, "$ref": "#/$defs/B", "$defs": {"B": B}},
        {"properties": {"x": {"allOf": [A, B]}, "y": A}},
    ],
    ids=lambda parameters: ",".join(parameters),
)
def test_an_object_is_open_where_it_says_so_or_others_describe_it_too(
    parameters: dict[str, Any],
) -> None:
    assert not closed(parameters) or parameters.get("additionalProperties") is False


def test_properties_may_have_the_names_of_keywords() -> None:
    names = {"properties": YES, "$ref": YES, "required": YES, "items": A, "enum": YES}
    schema = arguments_schema(function({"properties": names}), "#/there")
    assert set(schema["properties"]) == set(names)
    assert schema["properties"]["$ref"] == YES


def test_references_go_where_the_schema_has_gone() -> None:
    parameters = {
        "properties": {"up": {"$ref": "#"}, "in": {"$ref": "#/$defs/A"}, "out": {"$ref": "x"}},
        "$defs": {"A": {"const": {"$ref": "#/text"}}},
    }
    schema = arguments_schema(function(parameters), "#/$defs/7")
    assert schema["properties"]["up"] == {"$ref": "#/$defs/7"}
    assert schema["properties"]["in"] == {"$ref": "#/$defs/7/$defs/A"}
    assert schema["properties"]["out"] == {"$ref": "x"}
    assert schema["$defs"]["A"] == {"const": {"$ref": "#/text"}}


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/A", "$defs": {"A": A}},
        {
            "properties": {"x": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}},
            "$defs": {"A": A},
        },
        {"definitions": {"A": A}, "properties": {"x": {"allOf": [{"$ref": "#/definitions/A"}]}}},
        {**A, "anyOf": [B, {"required": ["a"]}]},
        {"allOf": [A, B]},
        {"oneOf": [A, B]},
        {"properties": {"up": {"anyOf": [{"$ref": "#"}, YES]}}, "required": ["up"]},
    ],
    ids=lambda parameters: ",".join(parameters),
)
def test_what_schemas_say_can_be_written(tiny: Engine, parameters: dict[str, Any]) -> None:
    own = Function(name="own", parameters=parameters)
    other = Function(name="other", parameters=B)
    has_end = "anyOf" not in parameters and "allOf" not in parameters
    for seed in range(4):
        sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": 60, "seed": seed}
        schema: Any = arguments_schema(own)
        done = tiny.generate("x", None, SamplingParams(**sampling, json_schema=schema))
        assert done.text.startswith("{")
        if has_end:
            assert done.finish_reason == "stop"
            assert isinstance(json.loads(done.text), dict)
        schema = calls_schema([other, own], parallel=False)
        done = tiny.generate("x", None, SamplingParams(**sampling, json_schema=schema))
        if has_end or '"other"' in done.text:
            call = json.loads(done.text)
            assert set(call) == {"name", "arguments"}
            assert call["name"] in {"own", "other"}
            assert isinstance(call["arguments"], dict)
