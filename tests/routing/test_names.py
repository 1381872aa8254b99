"""Names of sub-networks: what they mean, their canonical form, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.errors import RoutingError
from elastic_moe.routing import (
    ModelShape,
    as_float32,
    is_name,
    parse_name,
    resolve,
    spell_float32,
)
from tests.routing.shapes import ADDED, MINI, MIXED, choices, shapes, tables

TWO_LAYERS = replace(MINI, num_layers=2, moe_layers=frozenset({0, 1}))


def message(shape: ModelShape = MINI, **choice: Any) -> str:
    """What resolving this refused choice says."""
    with pytest.raises(RoutingError) as refusal:
        resolve(shape, **choice)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("full", "full"),
        ("L36-k2-m1-w6-t0.7-p8", "L36-k2-w6-t0.7-p8"),
        ("L36-k2-w6-t0.7-p8", "L36-k2-w6-t0.7-p8"),
        ("L48-k4-m1-w8-t0-p16", "full"),
        ("L48", "full"),
        ("t0.0", "full"),
        ("k2-m2", "k2-m2"),
        ("m1", "full"),
        ("p8", "p8"),
        ("t1", "t1"),
        ("t0.70", "t0.7"),
        ("t0.1000000001", "t0.1"),  # the same float32
        ("L1", "L1"),
        ("Lx5", "Lx5"),
        ("Lx800000000000-k1", "Lx800000000000-k1"),
        ("Lx7", "L3"),  # a prefix after all
        ("Lxffffffffffff", "full"),
        ("L012-k02", "L12-k2"),
        ("k2-L3", "L3-k2"),  # in any order
        ("p8-k2", "k2-p8"),
        ("p8-t0.7-w6-m1-k2-L36", "L36-k2-w6-t0.7-p8"),
        ("k2x48", "k2"),  # no layer differs
        ("k2x24,2x24", "k2"),
        ("L24-k2x24,4x24", "L24-k2"),  # those that differ do not run
        ("pxff", "p8"),
    ],
)
def test_a_name_resolves_and_has_one_canonical_form(written, canonical):
    subnet = parse_name(MINI, written)
    assert subnet.name == canonical
    assert parse_name(MINI, canonical) == subnet


def test_the_example_name_means_what_it_says():
    assert parse_name(MINI, "L36-k2-m1-w6-t0.7-p8") == resolve(
        MINI,
        depth=36,
        top_k=2,
        min_experts=1,
        expert_width=6,
        sparsity_threshold=0.7,
        expert_pool=8,
    )


def test_a_layer_set_is_written_as_bits_in_hexadecimal():
    assert resolve(MINI, active_layers=[0, 2]).name == "Lx5"
    assert resolve(MINI, active_layers=[4, 47]).name == "Lx800000000010"
    assert parse_name(MINI, "Lx800000000010").active_layers == (4, 47)


def test_values_of_layers_that_do_not_route_are_in_no_name():
    assert resolve(MIXED, top_k=[1, 2, 2]).name == "full"
    assert resolve(MIXED, depth=1, top_k=1, expert_width=1).name == "L1"


PER_LAYER = {
    "top_k": ({"top_k": [2] + [4] * 47}, "k2x1,4x47"),
    "top_k in three runs": ({"top_k": [4] * 12 + [2] * 35 + [3]}, "k4x12,2x35,3x1"),
    "min_experts": ({"min_experts": [2] + [1] * 47}, "m2x1,1x47"),
    "width": ({"expert_width": [6] + [8] * 47}, "w6x1,8x47"),
    "threshold": ({"sparsity_threshold": [0.5] + [0.0] * 47}, "t0.5x1,0x47"),
    "pool": ({"expert_pool": [list(range(8))] + [list(range(16))] * 47}, "p8x1,16x47"),
    "a pool that is no prefix": ({"expert_pool": [0, 1, 2, 4]}, "px17"),
    "such pools per layer": (
        {"expert_pool": [[0, 1, 2, 4]] * 2 + [[4, 5, 6, 7]] * 46},
        "px17x2,xf0x46",
    ),
    "several axes": (
        {"depth": 24, "top_k": [4] * 12 + [2] * 36, "expert_width": 6, "expert_pool": [0, 1, 2, 4]},
        "L24-k4x12,2x36-w6-px17",
    ),
}


@pytest.mark.parametrize(("choice", "name"), PER_LAYER.values(), ids=PER_LAYER)
def test_values_per_layer_have_a_name_that_can_be_given_back(choice, name):
    subnet = resolve(MINI, **choice)
    assert subnet.name == name
    assert parse_name(MINI, name) == subnet


def test_a_name_by_fingerprint_as_older_versions_gave_it_is_refused_with_a_remedy():
    with pytest.raises(RoutingError, match="'x0badcafe' has values per layer") as refusal:
        parse_name(MINI, "x0badcafe")
    assert "configuration" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("k4x12,2x35", "top_k lists 47 values, but the model has 48 layers"),
        ("k2x1", "top_k lists 1 values, but the model has 48 layers"),
        ("k1x999999999", "top_k lists 999999999 values"),
        ("k5x1,4x47", "layer 0: top_k must be an integer in [1, 4], got 5"),
        ("k4x47,0x1", "layer 47: top_k must be an integer in [1, 4], got 0"),
        ("p8x47,999999999x1", "expert_pool must be an integer in [1, 16], got 999999999"),
        ("px10000", "expert_pool must be an integer in [0, 15], got 16"),
        ("px0", "expert_pool must list 1 to 16 different expert ids, got []"),
        ("px0x48", "layer 0: expert_pool must list 1 to 16 different expert ids, got []"),
        ("px1x48", "layer 0: top_k must be an integer in [1, 1], got 4"),
        ("t0.5x47,2x1", "layer 47: sparsity_threshold must be a number in [0, 1], got 2.0"),
    ],
)
def test_values_per_layer_in_a_name_are_checked_as_others(name, complaint):
    with pytest.raises(RoutingError) as refusal:
        parse_name(MINI, name)
    assert complaint in str(refusal.value)


def written(shape: ModelShape, choice: dict[str, Any]) -> str:
    """The canonical name of a choice, spelled independently of `Subnet.name`."""
    layers = choice.get("active_layers", range(choice.get("depth", 0)))
    parts = []
    if list(layers) != list(range(len(layers))):
        parts.append("Lx" + format(sum(2**layer for layer in layers), "x"))
    elif len(layers) < shape.num_layers:
        parts.append(f"L{len(layers)}")
    if shape.moe_layers.intersection(layers):
        numbers = [
            ("k", choice["top_k"], shape.max_top_k),
            ("m", choice["min_experts"], 1),
            ("w", choice["expert_width"], shape.width_granules),
            ("t", f"{choice['sparsity_threshold']:g}", "0"),
            ("p", choice["expert_pool"], shape.num_experts),
        ]
        parts += [f"{letter}{value}" for letter, value, full in numbers if value != full]
    return "-".join(parts) or "full"


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_canonical_name_comes_back_unchanged(data):
    shape = data.draw(shapes())
    choice = data.draw(choices(shape))
    for axis in ADDED:  # `written` does not spell them
        del choice[axis.name]
    choice["sparsity_threshold"] = data.draw(st.integers(0, 20)) / 20
    name = written(shape, choice)
    assert parse_name(shape, name).name == name
    assert parse_name(shape, name) == resolve(shape, **choice)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_subnet_comes_back_from_its_name(data):
    shape = data.draw(shapes())
    subnet = resolve(shape, **data.draw(choices(shape)))
    again = parse_name(shape, subnet.name)
    assert again == subnet
    assert again.fingerprint == subnet.fingerprint
    assert again.name == subnet.name


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_subnet_with_values_per_layer_comes_back_from_its_name_in_any_order(data):
    shape = data.draw(shapes())
    subnet = resolve(shape, **data.draw(tables(shape)))
    assert parse_name(shape, subnet.name) == subnet
    parts = data.draw(st.permutations(subnet.name.split("-")))
    assert parse_name(shape, "-".join(parts)) == subnet
    assert is_name(subnet.name)


@given(st.floats(0, 1, width=32))
@settings(deadline=None)
def test_a_threshold_is_spelled_without_exponent_and_reads_back(value):
    text = spell_float32(value)
    assert as_float32(float(text)) == value
    assert set(text) <= set("0123456789.")


def test_a_threshold_is_spelled_as_short_as_possible():
    assert [spell_float32(as_float32(t)) for t in (0.7, 0.65, 1 / 3, 1e-10, 1.0, 0.0)] == [
        "0.7",
        "0.65",
        "0.33333334",
        "0.0000000001",
        "1",
        "0",
    ]


NO_NAMES = [
    "",
    " ",
    "-",
    "L36-",
    "-L36",
    "-k2",
    "--k2",
    "L36--k2",
    "L36k2",
    "k2-k4x48",
    "kx3",
    "k2x",
    "k2,4",
    "k2x1,4",
    "k2x24,,4x24",
    "L24x48",
    "px",
    "pxG",
    "k2-k2",
    "L36-L36",
    "L",
    "Lx",
    "LxG",
    "LxF",
    "Lx-1",
    "L-1",
    "L+1",
    "L1_0",
    "L1.0",
    "l36",
    "K2",
    "k",
    "k2 ",
    "k2\n",
    "\nk2",
    "k2\0",
    "k 2",
    "k2,w6",
    "full-k2",
    "Full",
    "FULL",
    "k\u0663",  # an Arabic digit, which `\d` and `int` take for 3
    "L\u0663",
    "t0.\u0667",
    "w\uff16",
    "t.7",
    "t1.",
    "t1e-1",
    "tnan",
    "tinf",
    "t-0.5",
    "t0,7",
    "x",
    "x1234567",
    "x123456789",
    "xABCDEF01",
    "k" + "9" * 5000,  # `int` reads no more than 4300 digits
    "L" + "9" * 5000,
    "w" + "0" * 5000 + "1",
    "\ud800",
    "k2" * 100_000,
]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name[:12]))
def test_what_is_no_name_is_refused_with_the_grammar(name):
    with pytest.raises(RoutingError) as refusal:
        parse_name(MINI, name)
    text = str(refusal.value)
    assert text.startswith(repr(name)[:70])
    assert "'L36-k2-w6-t0.7-p8'" in text
    assert len(text) < 500  # the message quotes no flood


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("L0", "depth must be an integer in [1, 48], got 0"),
        ("L49", "depth must be an integer in [1, 48], got 49"),
        ("L999999999", "depth must be an integer in [1, 48], got 999999999"),
        ("Lx0", "active_layers is empty; 1 to 48 layers must run"),
        ("Lx" + "f" * 1000, "active_layers must be an integer in [0, 47], got 48"),
        ("Lx1" + "0" * 200_000, "active_layers must be an integer in [0, 47], got 800000"),
        ("k0", "top_k must be an integer in [1, 4], got 0"),
        ("k5", "top_k must be an integer in [1, 4], got 5"),
        ("k2-p1", "top_k must be an integer in [1, 1], got 2"),
        ("m5", "min_experts must be an integer in [1, 4], got 5"),
        ("k2-m3", "min_experts must be an integer in [1, 2], got 3"),
        ("m0", "min_experts must be an integer in [1, 4], got 0"),
        ("w0", "expert_width must be an integer in [1, 8], got 0"),
        ("w9", "expert_width must be an integer in [1, 8], got 9"),
        ("t1.1", "sparsity_threshold must be a number in [0, 1], got 1.1"),
        ("t" + "9" * 5000, "sparsity_threshold must be a number in [0, 1], got inf"),
        ("p0", "expert_pool must be an integer in [1, 16], got 0"),
        ("p17", "expert_pool must be an integer in [1, 16], got 17"),
        ("p3", "top_k must be an integer in [1, 3], got 4"),  # the full k does not fit
    ],
)
def test_a_name_out_of_range_is_refused_with_field_value_and_range(name, complaint):
    with pytest.raises(RoutingError) as refusal:
        parse_name(MINI, name)
    assert complaint in str(refusal.value)


NAMELIKE = st.text(alphabet="Lkmwtpx0123456789abcdef.-", max_size=16)


@given(st.text() | NAMELIKE | st.lists(NAMELIKE, max_size=5).map("-".join))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_name_or_a_routing_error(text):
    try:
        subnet = parse_name(MINI, text)
    except RoutingError:
        return
    assert parse_name(MINI, subnet.name) == subnet
