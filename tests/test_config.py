"""`ElasticRoutingConfig`: what clients write, in both spellings, and what it means for a model.

Integers are strict: `2.0` is refused for `routingTopK`, as are `"2"` and `true`. A TypeScript
client cannot send `2.0`, since JSON.stringify(2.0) is `2`; where another client sends it, a float
stands where an integer is due, and `resolve` refuses it too. A threshold may be the integer 0 or 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from elastic_moe.config import ElasticRoutingConfig, RoutingConfig, resolve_routing
from elastic_moe.errors import RoutingError
from elastic_moe.protocol.routing import AppliedRouting
from elastic_moe.protocol.routing import values as values_of
from elastic_moe.routing import Subnet, as_float32, parse_name, resolve
from elastic_moe.routing.axes import AXES, camel, spellings
from tests.routing.shapes import ADDED, MINI, OLMOE, choices, reduced, shapes, tables

# As JSON.stringify writes them.
LAYERS_32 = ",".join(str(layer) for layer in range(32))
LAYERS_36 = ",".join(str(layer) for layer in range(36))
LAYERS_48 = ",".join(str(layer) for layer in range(48))
DEFAULT = (
    '{"modelId":"ernie-5.1-prod","maxDepth":48,"activeLayers":[' + LAYERS_32 + "],"
    '"expertWidth":8,"routingTopK":2,"sparsityThreshold":0.65,"fallbackStrategy":"stream"}'
)
PRODUCTION = (
    '{"modelId":"ernie-5.1-prod","maxDepth":48,"activeLayers":[' + LAYERS_36 + "],"
    '"expertWidth":6,"routingTopK":2,"sparsityThreshold":0.7,"fallbackStrategy":"stream"}'
)
DETERMINISTIC = (
    '{"modelId":"ernie-5.1-prod","maxDepth":48,"activeLayers":[' + LAYERS_48 + "],"
    '"expertWidth":8,"routingTopK":2,"sparsityThreshold":0.5,"fallbackStrategy":"retry"}'
)
PER_LAYER = {axis.client: axis for axis in AXES if axis.per_layer}
KNOBS = {  # field -> its spelling in camelCase
    **{field: camel(field) for field in PER_LAYER},
    "max_depth": "maxDepth",
    "active_layers": "activeLayers",
    "expert_width": "expertWidth",
    "routing_top_k": "routingTopK",
    "sparsity_threshold": "sparsityThreshold",
    "expert_pool": "expertPool",
    "min_experts": "minExperts",
}
SPELLINGS = {"model_id": "modelId", "fallback_strategy": "fallbackStrategy", **KNOBS}
TWICE = [field for field, spelling in SPELLINGS.items() if spelling != field]
EIGHT_LAYERS = replace(MINI, num_layers=8, moe_layers=frozenset(range(8)))


# --- the three configurations of remote clients


@pytest.mark.parametrize(
    ("text", "depth", "width", "threshold", "fallback", "name"),
    [
        (DEFAULT, 32, 8, 0.65, "stream", "L32-k2-t0.65"),
        (PRODUCTION, 36, 6, 0.7, "stream", "L36-k2-w6-t0.7"),
        (DETERMINISTIC, 48, 8, 0.5, "retry", "k2-t0.5"),
    ],
    ids=["default", "production", "deterministic"],
)
def test_a_clients_json_loads_unchanged_and_runs_on_elastic_mini(
    text, depth, width, threshold, fallback, name
):
    config = ElasticRoutingConfig.parse_json(text)
    assert config.fallback_strategy == fallback
    subnet = config.resolve(MINI)
    assert subnet.active_layers == tuple(range(depth))
    assert subnet.uniform("top_k") == 2
    assert subnet.uniform("expert_width") == width
    assert subnet.uniform("sparsity_threshold") == as_float32(threshold)
    assert subnet.uniform("min_experts") == 1
    assert subnet.uniform("expert_pool") == tuple(range(16))
    assert subnet.name == name


def test_the_defaults_are_the_first_of_them():
    config = ElasticRoutingConfig()
    assert config == ElasticRoutingConfig.parse_json(DEFAULT)
    known = {
        "model_id": "ernie-5.1-prod",
        "max_depth": 48,
        "active_layers": list(range(32)),
        "expert_width": 8,
        "routing_top_k": 2,
        "sparsity_threshold": 0.65,
        "fallback_strategy": "stream",
        "expert_pool": None,
        "min_experts": 1,
    }
    added = {field: None for field in PER_LAYER if field not in known}  # full
    assert config.model_dump() == {**added, **known}


def test_no_instance_can_change_the_defaults():
    ElasticRoutingConfig().active_layers.append(99)  # type: ignore[union-attr]
    assert ElasticRoutingConfig().active_layers == list(range(32))
    with pytest.raises(ValidationError, match="frozen"):
        ElasticRoutingConfig().routing_top_k = 1  # type: ignore[misc]


# --- spellings


def test_every_field_has_these_two_spellings():
    assert {*SPELLINGS, "depth", "name"} == set(ElasticRoutingConfig.model_fields)
    assert json.loads(ElasticRoutingConfig().model_dump_json()).keys() == set(SPELLINGS)
    camel = json.loads(ElasticRoutingConfig().model_dump_json(by_alias=True))
    assert camel.keys() == set(SPELLINGS.values())


VALUES: dict[str, Any] = {
    **{field: reduced(axis, MINI) for field, axis in PER_LAYER.items()},
    "model_id": "another",
    "max_depth": 8,
    "active_layers": [1, 2],
    "expert_width": 4,
    "routing_top_k": 3,
    "sparsity_threshold": 0.25,
    "fallback_strategy": "cache",
    "expert_pool": 12,
    "min_experts": 2,
}


@pytest.mark.parametrize("field", SPELLINGS)
def test_both_spellings_say_the_same(field):
    value, camel = VALUES[field], SPELLINGS[field]
    ways = [
        ElasticRoutingConfig.parse({field: value}),
        ElasticRoutingConfig.parse({camel: value}),
        ElasticRoutingConfig.parse_json(json.dumps({field: value})),
        ElasticRoutingConfig.parse_json(json.dumps({camel: value}).encode()),
        ElasticRoutingConfig(**{field: value}),
        ElasticRoutingConfig(**{camel: value}),
    ]
    assert all(getattr(way, field) == value for way in ways)
    assert all(way == ways[0] for way in ways)


@pytest.mark.parametrize("order", [1, -1], ids=["snake first", "camel first"])
@pytest.mark.parametrize("same", [True, False], ids=["same value", "other value"])
@pytest.mark.parametrize("field", TWICE)
def test_both_spellings_at_once_are_refused(field, same, order):
    camel, value = SPELLINGS[field], VALUES[field]
    other = value if same else ElasticRoutingConfig.model_fields[field].get_default()
    both = dict([(field, value), (camel, other)][::order])
    complaint = f"{field} and {camel} are both given. Keep one spelling."
    with pytest.raises(RoutingError, match=complaint):
        ElasticRoutingConfig.parse(both)
    with pytest.raises(RoutingError, match=complaint):
        ElasticRoutingConfig.parse_json(json.dumps(both))
    with pytest.raises(RoutingError, match=complaint):
        ElasticRoutingConfig.full(**both)
    with pytest.raises(ValidationError, match=field):
        ElasticRoutingConfig(**both)


@pytest.mark.parametrize(
    "key",
    [
        "top-k",
        "experts",
        "active_experts",
        "profile",
        "routing_topk",
        "RoutingTopK",
        "routingTopk",
        "",
    ],
)
def test_an_unknown_key_is_refused_and_the_known_ones_are_named(key):
    for parse in (ElasticRoutingConfig.parse, lambda d: ElasticRoutingConfig.full(**d)):
        with pytest.raises(RoutingError) as refusal:
            parse({key: 2})
        assert "active_layers, expert_pool, expert_width" in str(refusal.value)
        assert repr(key or "configuration") in str(refusal.value)
    with pytest.raises(RoutingError, match="unknown key"):
        ElasticRoutingConfig.parse_json(json.dumps({key: 2}))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ElasticRoutingConfig(**{key: 2})


@pytest.mark.parametrize(
    ("axis", "spelling"), [(axis, s) for axis in AXES for s in spellings(axis.name)]
)
def test_every_spelling_of_an_axis_is_accepted_wherever_one_is(axis, spelling):
    value = 0.5 if axis.kind == "real" else 1
    expected = ElasticRoutingConfig.full(**{axis.client: value})
    assert ElasticRoutingConfig.full(**{spelling: value}) == expected
    assert ElasticRoutingConfig.parse({spelling: value}).value(axis) == value
    assert RoutingConfig.parse({spelling: value}).value(axis) == value
    assert RoutingConfig.parse_json(json.dumps({spelling: value})).value(axis) == value


def test_two_spellings_are_refused_whatever_they_are():
    for both in ({"top_k": 1, "routingTopK": 1}, {"topK": 1, "routing_top_k": 1}):
        for kind in (RoutingConfig, ElasticRoutingConfig):
            with pytest.raises(RoutingError, match=r"are both given\. Keep one spelling"):
                kind.parse(both)


def test_a_depth_takes_the_place_of_the_default_layers():
    assert ElasticRoutingConfig(depth=12).resolve(MINI).name == "L12-k2-t0.65"
    assert "depth" not in ElasticRoutingConfig().model_dump()
    assert ElasticRoutingConfig(depth=12).model_dump()["depth"] == 12


# --- an answer's routing, given back


def answer(subnet: Subnet) -> dict[str, Any]:
    """`routing` of an answer, as JSON brings it."""
    written = AppliedRouting(
        name=subnet.name,
        model="elastic-mini",
        active_params=subnet.active_params,
        flops_per_token=subnet.flops_per_token(64),
        mean_experts=1.5,
        profile="interactive",
        limited={"depth": {"asked": 48, "applied": 12}},
        **values_of(subnet),
    )
    data: dict[str, Any] = json.loads(written.model_dump_json())
    return data


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_an_answers_routing_is_a_configuration_that_means_the_same(data):
    shape = data.draw(shapes())
    subnet = resolve(shape, **data.draw(choices(shape) | tables(shape)))
    reported = answer(subnet)
    assert ElasticRoutingConfig.parse(reported).resolve(shape) == subnet
    assert ElasticRoutingConfig.parse_json(json.dumps(reported)).resolve(shape) == subnet
    assert ElasticRoutingConfig.full(**reported).resolve(shape) == subnet
    assert RoutingConfig.parse(reported).resolve(shape) == subnet
    without_name = values_of(subnet)
    assert RoutingConfig.parse(without_name).resolve(shape) == subnet
    assert {axis.wire for axis in AXES} <= reported.keys()


def test_a_name_alone_says_all():
    for kind in (RoutingConfig, ElasticRoutingConfig):
        assert kind.parse({"name": "L24-k2"}).resolve(MINI) == parse_name(MINI, "L24-k2")


@pytest.mark.parametrize(
    "change",
    [{"depth": 23}, {"active_layers": [0]}, {"top_k": 3}, {"sparsity": 0.1}, {"name": "L3"}],
)
def test_a_name_beside_values_that_mean_something_else_is_refused(change):
    reported = {**answer(parse_name(MINI, "L24-k2")), **change}
    with pytest.raises(RoutingError, match=r"name|both given"):
        RoutingConfig.parse(reported).resolve(MINI)


def test_what_an_answer_tells_of_its_run_is_accepted_beside_a_name_only():
    with pytest.raises(RoutingError, match="unknown key 'profile'"):
        RoutingConfig.parse({"top_k": 2, "profile": "interactive"})


# --- the whole network with changes


def test_full_is_the_full_network_of_any_model():
    for shape in (MINI, OLMOE, EIGHT_LAYERS):
        assert ElasticRoutingConfig.full().resolve(shape) == Subnet.full(shape)


@pytest.mark.parametrize(
    ("knob", "value", "choice"),
    [
        *((field, VALUES[field], {axis.name: VALUES[field]}) for field, axis in PER_LAYER.items()),
        ("max_depth", 48, {}),
        ("active_layers", [0, 2], {"active_layers": [0, 2]}),
        ("expert_width", 6, {"expert_width": 6}),
        ("routing_top_k", 2, {"top_k": 2}),
        ("sparsity_threshold", 0.7, {"sparsity_threshold": 0.7}),
        ("expert_pool", 8, {"expert_pool": 8}),
        ("expert_pool", [9, 3, 5, 7], {"expert_pool": [3, 5, 7, 9]}),
        ("min_experts", 2, {"min_experts": 2}),
    ],
)
def test_full_with_a_change_in_either_spelling_changes_that_axis_alone(knob, value, choice):
    expected = resolve(MINI, **choice)
    assert ElasticRoutingConfig.full(**{knob: value}).resolve(MINI) == expected
    assert ElasticRoutingConfig.full(**{KNOBS[knob]: value}).resolve(MINI) == expected


@pytest.mark.parametrize("key", ["cls", "self", "changes"])
def test_full_refuses_a_key_that_python_uses_itself_as_any_unknown_one(key):
    with pytest.raises(RoutingError, match=f"unknown key '{key}'; allowed are active_layers"):
        ElasticRoutingConfig.full(**{key: 1})


def test_full_refuses_wrong_values_as_parse_does():
    with pytest.raises(RoutingError, match="routing_top_k"):
        ElasticRoutingConfig.full(routing_top_k="2")


# --- resolving


def test_a_config_for_another_depth_is_refused_naming_both():
    with pytest.raises(RoutingError, match="max_depth is 48, but the model has 8 layers"):
        ElasticRoutingConfig().resolve(EIGHT_LAYERS)


def test_lists_give_every_layer_its_own_value():
    config = ElasticRoutingConfig.parse(
        {
            "maxDepth": 8,
            "activeLayers": [0, 1, 2, 3, 4, 5],
            "routingTopK": [1, 2, 3, 4, 1, 2, 3, 4],
            "minExperts": [1, 2, 3, 4, 1, 2, 3, 4],
            "expertWidth": [1, 2, 3, 4, 5, 6, 7, 8],
            "sparsityThreshold": [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1],
            "expertPool": [list(range(first, first + 4)) for first in range(8)],
        }
    )
    layers = config.resolve(EIGHT_LAYERS).layers
    for i, layer in enumerate(layers[:6]):
        assert (layer.top_k, layer.min_experts, layer.expert_width) == (i % 4 + 1, i % 4 + 1, i + 1)
        assert (layer.sparsity_threshold, layer.expert_pool) == (i / 8, tuple(range(i, i + 4)))
    assert not any(layer.active for layer in layers[6:])


def test_what_concerns_clients_only_is_in_no_fingerprint():
    plain = ElasticRoutingConfig().resolve(MINI)
    config = ElasticRoutingConfig(model_id="elastic-mini", fallback_strategy="cache")
    assert config.resolve(MINI).fingerprint == plain.fingerprint
    assert config.resolve(MINI) == plain


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"routing_top_k": 5}, "top_k must be an integer in [1, 4], got 5"),
        ({"expert_width": 9}, "expert_width must be an integer in [1, 8], got 9"),
        ({"sparsity_threshold": 1.5}, "sparsity_threshold must be a number in [0, 1], got 1.5"),
        ({"sparsity_threshold": math.nan}, "sparsity_threshold must be a number in [0, 1], got"),
        ({"expert_pool": 17}, "expert_pool must be an integer in [1, 16], got 17"),
        ({"min_experts": 5}, "min_experts must be an integer in [1, 4], got 5"),
        ({"active_layers": [48]}, "active_layers must be an integer in [0, 47], got 48"),
        ({"active_layers": []}, "active_layers is empty; 1 to 48 layers must run"),
        ({"routing_top_k": [2]}, "top_k lists 1 values, but the model has 48 layers"),
        ({"routing_top_k": 10**5000}, "top_k must be an integer in [1, 4], got <int"),
    ],
)
def test_a_range_is_checked_against_the_model(change, complaint):
    with pytest.raises(RoutingError) as refusal:
        ElasticRoutingConfig.full(**change).resolve(MINI)
    assert complaint in str(refusal.value)


# --- types: nothing is coerced

INTEGERS = ["max_depth", "expert_width", "routing_top_k", "expert_pool", "min_experts"]
INTEGERS += [axis.client for axis in ADDED if axis.kind != "real"]
REAL = ["sparsity_threshold", *(axis.client for axis in ADDED if axis.kind == "real")]
NO_NUMBER = ['"0.5"', "true", "{}", "[true]", '["0.5"]', "[[0.5]]", "[null]"]
WRONG: dict[str, list[str]] = {  # JSON texts
    **{field: ['"2"', "true", "2.0", "2e0", "NaN", "{}", "[true]", '["2"]'] for field in INTEGERS},
    **dict.fromkeys(REAL, NO_NUMBER),
    "active_layers": ["12", '"012"', "true", "{}", "[true]", "[1.0]", '["1"]', "[[0]]", "[null]"],
    "model_id": ["null", "1", "true", "[]"],
    "fallback_strategy": ["null", '"Stream"', '"drop"', "1", "[]"],
}


@pytest.mark.parametrize(
    ("field", "text"), [(field, text) for field, texts in WRONG.items() for text in texts]
)
def test_a_value_of_another_type_is_refused_naming_field_and_value(field, text):
    value = json.loads(text)
    wrong = value[0] if field == "active_layers" and isinstance(value, list) else value
    for key in (field, SPELLINGS[field]):
        for refused in (
            lambda key=key: ElasticRoutingConfig.parse({key: value}),
            lambda key=key: ElasticRoutingConfig.parse_json(f'{{"{key}":{text}}}'),
            lambda key=key: ElasticRoutingConfig.full(**{key: value}),
        ):
            with pytest.raises(RoutingError) as refusal:
                refused()
            assert key in str(refusal.value)
            assert f"got {wrong!r}." in str(refusal.value)


@pytest.mark.parametrize("text", ["0", "1", "0.0", "1e0", "[0, 1]"])
def test_a_threshold_may_be_written_as_an_integer(text):
    """JSON.stringify(1.0) is `1`."""
    value = ElasticRoutingConfig.parse_json(f'{{"sparsityThreshold":{text}}}').sparsity_threshold
    assert value == json.loads(text)


@pytest.mark.parametrize("knob", KNOBS)
def test_null_is_the_models_full_value(knob):
    config = ElasticRoutingConfig.parse_json(f'{{"{KNOBS[knob]}":null}}')
    assert getattr(config, knob) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "2",
        '"full"',
        '{"routingTopK":2,}',
        '{"routingTopK":' + "1" * 5000 + "}",
        '{"routingTopK":' + "[" * 5000 + "]" * 5000 + "}",
        b'{"modelId":"\xff"}',
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_text_that_is_no_such_json_is_a_short_routing_error(text):
    with pytest.raises(RoutingError) as refusal:
        ElasticRoutingConfig.parse_json(text)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("value", [None, [], "L36", 2, {1: 2}, {"model_id": 10**5000}, Subnet])
def test_an_object_that_is_no_configuration_is_a_routing_error(value):
    with pytest.raises(RoutingError):
        ElasticRoutingConfig.parse(value)


# --- round trips


def per_layer(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values | st.lists(values, max_size=3)


NUMBERS = st.integers(-5, 100) | st.integers()
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        **{
            field: per_layer(st.floats(allow_nan=False) if axis.kind == "real" else NUMBERS)
            for field, axis in PER_LAYER.items()
        },
        "model_id": st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        "max_depth": st.none() | NUMBERS,
        "active_layers": st.none() | st.lists(NUMBERS, max_size=4),
        "expert_width": per_layer(NUMBERS),
        "routing_top_k": per_layer(NUMBERS),
        "sparsity_threshold": per_layer(st.floats(allow_nan=False)),
        "fallback_strategy": st.sampled_from(["cache", "stream", "retry"]),
        "expert_pool": per_layer(NUMBERS) | st.lists(st.lists(NUMBERS, max_size=3), max_size=3),
        "min_experts": per_layer(NUMBERS),
    },
)


@given(values=CONFIGS, camel=st.booleans())
@settings(max_examples=150, deadline=None)
def test_json_round_trips_in_both_spellings(values, camel):
    config = ElasticRoutingConfig.parse(values)
    text = config.model_dump_json(by_alias=camel)
    again = ElasticRoutingConfig.parse_json(text)
    assert again == config
    assert again.model_dump_json(by_alias=camel) == text
    assert ElasticRoutingConfig.parse(config.model_dump(by_alias=camel)) == config


@given(values=CONFIGS)
@settings(max_examples=100, deadline=None)
def test_full_keeps_every_change_and_leaves_the_rest_full(values):
    config = ElasticRoutingConfig.full(**{to_camel(key): value for key, value in values.items()})
    for field in SPELLINGS:
        if field in values:
            assert getattr(config, field) == values[field]
        elif field in KNOBS:
            assert getattr(config, field) is None


def test_a_threshold_that_is_no_number_is_not_dropped_on_the_way():
    """As null it would come back as the full value."""
    text = ElasticRoutingConfig(sparsity_threshold=math.nan).model_dump_json()
    again = ElasticRoutingConfig.parse_json(text)
    assert isinstance(again.sparsity_threshold, float)
    assert math.isnan(again.sparsity_threshold)


# --- what may stand for a routing


def test_no_routing_is_the_full_network():
    assert resolve_routing(MINI, None) == Subnet.full(MINI)


def test_a_name_a_configuration_and_a_subnet_are_resolved_alike():
    subnet = parse_name(MINI, "L32-k2-t0.65")
    assert resolve_routing(MINI, "L32-k2-t0.65") == subnet
    assert resolve_routing(MINI, ElasticRoutingConfig()) == subnet
    assert resolve_routing(MINI, subnet) is subnet


def test_a_subnet_of_another_shape_is_refused():
    subnet = parse_name(OLMOE, "L4-k2")
    with pytest.raises(RoutingError) as refusal:
        resolve_routing(MINI, subnet)
    assert "'L4-k2' belongs to a model of another shape (8 layers, 64 experts)" in str(
        refusal.value
    )


@pytest.mark.parametrize("routing", [{}, {"routing_top_k": 2}, 2, ["L36"], b"L36", Subnet, True])
def test_anything_else_is_refused_naming_its_type(routing):
    with pytest.raises(RoutingError, match=f"or None, got {type(routing).__name__}"):
        resolve_routing(MINI, routing)


def test_a_name_that_does_not_fit_is_refused():
    with pytest.raises(RoutingError, match=r"depth must be an integer in \[1, 48\], got 49"):
        resolve_routing(MINI, "L49")
    with pytest.raises(RoutingError, match="is no sub-network name"):
        resolve_routing(MINI, "")
