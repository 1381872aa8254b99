"""Sub-networks: what a choice of the axes means, fingerprints, refusals. `test_names` has names."""

from __future__ import annotations

import math
import pickle
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.errors import ElasticMoEError, RoutingError
from elastic_moe.routing import (
    LayerSubnet,
    ModelShape,
    Subnet,
    as_float32,
    parse_name,
    resolve,
)
from elastic_moe.routing.axes import AXES, KEYS, camel
from elastic_moe.routing.axes import PER_LAYER as PER_LAYER_AXES
from tests.routing.shapes import (
    ADDED,
    MINI,
    MIXED,
    OLMOE,
    full_of_added,
    in_layer,
    reduced,
    rows,
    shapes,
    tables,
)

TWO_LAYERS = replace(MINI, num_layers=2, moe_layers=frozenset({0, 1}))


def message(shape: ModelShape = MINI, **choice: Any) -> str:
    """What resolving this refused choice says."""
    with pytest.raises(RoutingError) as refusal:
        resolve(shape, **choice)
    return str(refusal.value)


# --- what a choice means


def test_an_absent_axis_means_the_full_value():
    every = LayerSubnet(True, 4, 1, 8, 0.0, tuple(range(16)), **full_of_added(MINI))
    assert resolve(MINI).layers == (every,) * 48
    assert Subnet.full(MINI) == resolve(MINI)


def test_a_depth_runs_the_first_layers_only():
    subnet = resolve(MINI, depth=36)
    assert subnet.active_layers == tuple(range(36))
    assert subnet.depth == 36
    assert subnet.is_prefix
    assert subnet == resolve(MINI, active_layers=range(36))


def test_a_layer_set_runs_these_layers_only():
    subnet = resolve(MINI, active_layers=[0, 7, 47])
    assert subnet.active_layers == (0, 7, 47)
    assert not subnet.is_prefix


def test_a_list_gives_every_layer_its_own_value():
    subnet = resolve(
        MIXED,
        top_k=[1, 2, 1],
        min_experts=[1, 2, 1],
        expert_width=[1, 2, 3],
        sparsity_threshold=[0, 0.5, 1],
        expert_pool=[[0], [3, 1], [2]],
    )
    assert subnet.layers == (
        LayerSubnet(True),  # dense: nothing is routed
        LayerSubnet(True, 2, 2, 2, 0.5, (1, 3), **full_of_added(MIXED)),
        LayerSubnet(True, 1, 1, 3, 1.0, (2,), **full_of_added(MIXED)),
    )


def test_a_list_of_ids_is_the_pool_of_every_layer():
    assert {layer.expert_pool for layer in resolve(MINI, expert_pool=[9, 1, 3, 15]).layers} == {
        (1, 3, 9, 15)
    }


def test_the_threshold_is_a_float32():
    threshold = resolve(MINI, sparsity_threshold=0.7).uniform("sparsity_threshold")
    assert threshold == struct.unpack("<f", struct.pack("<f", 0.7))[0]
    assert threshold != 0.7


def test_a_shared_value_is_uniform_and_differing_values_are_none():
    subnet = resolve(MIXED, top_k=[2, 1, 1], expert_width=[1, 1, 2])
    assert subnet.uniform("top_k") == 1  # layer 0 is dense
    assert subnet.uniform("expert_width") is None
    assert resolve(MIXED, depth=1).uniform("top_k") is None


def test_equal_subnets_are_one_key_and_survive_pickling():
    one, other = resolve(MINI, depth=3, top_k=2), parse_name(MINI, "L3-k2")
    assert {one: "here"}[other] == "here"
    assert pickle.loads(pickle.dumps(one)) == other  # noqa: S301  our own bytes
    assert repr(one) == "Subnet('L3-k2', 3 of 48 layers)"


# --- cutting at a depth


def test_at_depth_is_the_prefix_of_that_depth():
    deep = parse_name(MINI, "L36-k2-w6-t0.7-p8")
    assert deep.at_depth(12) == parse_name(MINI, "L12-k2-w6-t0.7-p8")
    assert deep.at_depth(36) == deep
    assert deep.at_depth(48) == deep


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_at_depth_leaves_the_layers_below_as_they_are(data):
    shape = data.draw(shapes())
    subnet = resolve(shape, **data.draw(tables(shape)))
    depth = data.draw(st.integers(subnet.active_layers[0] + 1, shape.num_layers))
    cut = subnet.at_depth(depth)
    assert cut.layers[:depth] == subnet.layers[:depth]
    assert not any(layer.active for layer in cut.layers[depth:])


@pytest.mark.parametrize("depth", [0, -1, 49, True, 12.0])
def test_at_depth_outside_the_model_is_refused(depth):
    with pytest.raises(RoutingError, match=r"depth must be an integer in \[1, 48\], got"):
        Subnet.full(MINI).at_depth(depth)


def test_at_depth_below_the_first_running_layer_is_refused():
    with pytest.raises(RoutingError, match=r"depth must be above 5, .* in 'Lx60', got 3"):
        parse_name(MINI, "Lx60").at_depth(3)


# --- fingerprints


def test_fingerprints_never_drift():
    """KV keys and stored sweeps refer to these: a change breaks them."""
    assert parse_name(MINI, "L36-k2-w6-t0.7-p8").fingerprint == (
        "73708ca594eec0a9b53ec4f0daa5b9d7dcf86f16a0a3113c658242993ea8aca8"
    )
    assert Subnet.full(MINI).fingerprint == (
        "478d60b72c71f812e8057906ff0440d840c87b7dcdc9400020ee61cad719f8b9"
    )


def test_one_choice_has_one_fingerprint_however_it_is_written():
    ways = [
        parse_name(MINI, "L36-k2-w6-t0.7-p8"),
        parse_name(MINI, "Lxfffffffff-k2-m1-w6-t0.70-p8"),
        resolve(
            MINI,
            depth=36,
            top_k=2,
            expert_width=6,
            sparsity_threshold=as_float32(0.7),
            expert_pool=8,
        ),
        resolve(
            MINI,
            max_depth=48,
            active_layers=tuple(range(36)),
            top_k=[2] * 36 + [1] * 12,  # layers that do not run
            min_experts=[1] * 48,
            expert_width=(6,) * 48,
            sparsity_threshold=[0.7] * 36 + [0.1] * 12,
            expert_pool=[[7, 6, 5, 4, 3, 2, 1, 0]] * 36 + [[3]] * 12,
        ),
        resolve(MINI, top_k=2, expert_width=6, sparsity_threshold=0.7, expert_pool=8).at_depth(36),
    ]
    assert len({subnet.fingerprint for subnet in ways}) == 1
    assert len(set(ways)) == 1


def test_zero_has_no_sign():
    assert resolve(MINI, sparsity_threshold=-0.0).fingerprint == Subnet.full(MINI).fingerprint


ONE_CHANGE = {
    "active": {"active": False},
    "top_k": {"top_k": 3},
    "min_experts": {"min_experts": 2},
    "width": {"expert_width": 7},
    "threshold": {"sparsity_threshold": as_float32(0.1)},
    "pool size": {"expert_pool": tuple(range(9))},
    "pool ids": {"expert_pool": (0, 1, 2, 3, 4, 5, 6, 8)},
    **{axis.name: {axis.name: in_layer(axis, reduced(axis, MINI))} for axis in ADDED},
}


@pytest.mark.parametrize("change", ONE_CHANGE.values(), ids=ONE_CHANGE)
@pytest.mark.parametrize("layer", [0, 47])
def test_each_value_of_each_layer_counts_in_the_fingerprint(change, layer):
    before = resolve(MINI, expert_pool=8)
    layers = list(before.layers)
    layers[layer] = replace(layers[layer], **change)
    changed = Subnet(MINI, tuple(layers))
    assert changed.fingerprint != before.fingerprint
    assert changed != before


def meaning(shape: ModelShape, choice: dict[str, Any]) -> list[Any]:
    """What a table says, layer by layer, with what does not count taken out."""
    table: list[Any] = []
    for layer in range(shape.num_layers):
        if layer not in choice["active_layers"]:
            table.append("inactive")
        elif layer not in shape.moe_layers:
            table.append("dense")
        else:
            row = {
                axis: values[layer] for axis, values in choice.items() if axis != "active_layers"
            }
            table.append({**row, "expert_pool": sorted(row["expert_pool"])})
    return table


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_fingerprints_are_equal_exactly_for_equal_tables(data):
    shape = data.draw(shapes())
    row, other_row = data.draw(rows(shape)), data.draw(rows(shape))
    axis = data.draw(st.sampled_from(sorted(row)))
    near = {**row, axis: other_row[axis]}  # differs in one value
    possible = near["min_experts"] <= near["top_k"] <= len(near["expert_pool"])
    palette = [row, near if possible else other_row]
    one, other = data.draw(tables(shape, palette)), data.draw(tables(shape, palette))
    a, b = resolve(shape, **one), resolve(shape, **other)
    same = meaning(shape, one) == meaning(shape, other)
    assert (a.fingerprint == b.fingerprint) == same
    assert (a == b) == same


# --- refusals: each names field, value and allowed range


INTEGERS = {
    "depth": "depth must be an integer in [1, 48], got {}",
    "top_k": "layer 0: top_k must be an integer in [1, 4], got {}",
    "min_experts": "layer 0: min_experts must be an integer in [1, 4], got {}",
    "expert_width": "layer 0: expert_width must be an integer in [1, 8], got {}",
    "expert_pool": "expert_pool must be an integer in [1, 16], got {}",
}


@pytest.mark.parametrize("value", [0, -1, 49, 10**9, True, False, 2.0, math.nan, math.inf, "2", {}])
@pytest.mark.parametrize("field", INTEGERS)
def test_an_integer_out_of_range_or_of_another_type_is_refused(field, value):
    assert INTEGERS[field].format(repr(value)) in message(**{field: value})


@pytest.mark.parametrize("field", [*INTEGERS, "sparsity_threshold", "max_depth"])
def test_a_number_too_long_to_print_is_refused_all_the_same(field):
    text = message(**{field: 10**5000})
    assert field in text
    assert "digits" in text


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, math.nan, math.inf, -math.inf, 2, True, False, "0.5", None, 1j]
)
def test_a_threshold_outside_0_to_1_is_refused(value):
    expected = f"layer 1: sparsity_threshold must be a number in [0, 1], got {value!r}"
    assert expected in message(TWO_LAYERS, sparsity_threshold=[0.5, value])
    if value is not None:  # None alone is the full value
        assert expected.replace("layer 1", "layer 0") in message(sparsity_threshold=value)


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([], "active_layers is empty; 1 to 48 layers must run"),
        ([1, 0], "active_layers must ascend without repetition, got 1 before 0 in [1, 0]"),
        ([0, 2, 2], "active_layers must ascend without repetition, got 2 before 2 in [0, 2, 2]"),
        ([0, 48], "active_layers must be an integer in [0, 47], got 48"),
        ([-1, 0], "active_layers must be an integer in [0, 47], got -1"),
        ([0, True], "active_layers must be an integer in [0, 47], got True"),
        ([0, 1.0], "active_layers must be an integer in [0, 47], got 1.0"),
        ([0, None], "active_layers must be an integer in [0, 47], got None"),
        (5, "active_layers must list integers in [0, 47], got 5"),
        ("012", "active_layers must list integers in [0, 47], got '012'"),
        (b"\0\1", r"active_layers must list integers in [0, 47], got b'\x00\x01'"),
    ],
)
def test_layers_that_cannot_run_are_refused(layers, complaint):
    assert complaint in message(active_layers=layers)


def test_depth_beside_as_many_layers_says_the_same():
    assert resolve(MINI, depth=3, active_layers=[0, 1, 2]) == resolve(MINI, depth=3)
    assert resolve(MINI, depth=2, active_layers=[0, 5]) == parse_name(MINI, "Lx21")


@pytest.mark.parametrize("depth", [2, 4, True, "3", 3.0])
def test_depth_beside_another_number_of_layers_is_refused(depth):
    assert f"but depth is {depth!r} and active_layers [0, 1, 2] are 3" in message(
        depth=depth, active_layers=[0, 1, 2]
    )


SPELLED = [
    (axis.name, spelling)
    for axis in AXES
    for snake in axis.snake
    for spelling in (snake, camel(snake))
]


@pytest.mark.parametrize(("name", "spelling"), SPELLED)
def test_every_spelling_of_an_axis_says_the_same(name, spelling):
    others = {} if name == "top_k" else {"top_k": 1}
    assert resolve(MINI, **{spelling: 1}, **others) == resolve(MINI, **{name: 1}, **others)


def test_two_spellings_of_one_axis_are_refused():
    assert "top_k and routingTopK are both given. Keep one" in message(top_k=2, routingTopK=2)


def test_an_unknown_key_is_refused_naming_the_axes():
    assert "unknown key 'experts'; allowed are active_layers, depth, expert_pool" in message(
        experts=2
    )


def test_each_axis_has_one_letter_and_spellings_of_its_own():
    assert len({axis.letter for axis in AXES}) == len(AXES)
    assert sum(len({*axis.snake, *map(camel, axis.snake)}) for axis in AXES) + 2 == len(KEYS)
    assert [axis.name for axis in PER_LAYER_AXES] == list(LayerSubnet.__slots__)[1:]


@pytest.mark.parametrize("depth", [47, 49, 0, 48.0, "48", True])
def test_a_choice_written_for_another_depth_is_refused_naming_both(depth):
    text = message(max_depth=depth)
    assert f"max_depth is {depth!r}, but the model has 48 layers" in text
    assert "set max_depth to 48" in text


def test_one_as_the_depth_of_a_one_layer_model_is_no_boolean():
    shape = replace(MINI, num_layers=1, moe_layers=frozenset({0}))
    assert resolve(shape, max_depth=1) == Subnet.full(shape)
    assert "max_depth is True" in message(shape, max_depth=True)


@pytest.mark.parametrize("count", [0, 1, 47, 49])
@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 1), ("min_experts", 1), ("expert_width", 1), ("sparsity_threshold", 0.5)],
)
def test_a_list_of_another_length_is_refused(field, value, count):
    text = message(**{field: [value] * count})
    assert f"{field} lists {count} values, but the model has 48 layers" in text


@pytest.mark.parametrize("count", [1, 47, 49])
def test_pools_of_another_number_of_layers_are_refused(count):
    text = message(top_k=1, expert_pool=[[0]] * count)
    assert f"expert_pool lists {count} values, but the model has 48 layers" in text


@pytest.mark.parametrize(
    ("pool", "complaint"),
    [
        ([], "expert_pool must list 1 to 16 different expert ids, got []"),
        ([1, 1], "expert_pool must list 1 to 16 different expert ids, got [1, 1]"),
        ([0, 16], "expert_pool must be an integer in [0, 15], got 16"),
        ([-1], "expert_pool must be an integer in [0, 15], got -1"),
        ([True], "expert_pool must be an integer in [0, 15], got True"),
        ([1.0], "expert_pool must be an integer in [0, 15], got 1.0"),
        ("01", "expert_pool must be an integer in [1, 16], got '01'"),
        (["01", "2"], "expert_pool must be an integer in [0, 15], got '01'"),
        ([[0], []], "layer 1: expert_pool must list 1 to 16 different expert ids, got []"),
        ([[0], [1, 1]], "layer 1: expert_pool must list 1 to 16 different expert ids, got [1, 1]"),
        ([[0], [16]], "layer 1: expert_pool must be an integer in [0, 15], got 16"),
        ([[0], "12"], "layer 1: expert_pool must be an integer in [1, 16], got '12'"),
    ],
)
def test_pools_that_cannot_be_are_refused(pool, complaint):
    assert complaint in message(TWO_LAYERS, top_k=1, expert_pool=pool)


def test_k_beyond_the_pool_is_refused_where_it_happens():
    assert "layer 1: top_k must be an integer in [1, 3], got 4" in message(
        TWO_LAYERS, top_k=4, expert_pool=[[0, 1, 2, 3], [0, 1, 2]]
    )


def test_bytes_are_no_list_of_numbers():
    assert "layer 0: top_k must be an integer in [1, 4], got b'" in message(top_k=b"\2" * 48)


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"top_k": [5, 1]}, "layer 0: top_k must be an integer in [1, 4], got 5"),
        ({"min_experts": [1, 1], "top_k": [1, 5]}, "layer 1: top_k must be"),
        ({"depth": 1, "top_k": [1, 5]}, "layer 1: top_k must be an integer in [1, 4], got 5"),
        (
            {"top_k": [2, 1], "min_experts": [2, 2]},
            "layer 1: min_experts must be an integer in [1, 1], got 2",
        ),
        (
            {"expert_width": [8, 9], "depth": 1},
            "layer 1: expert_width must be an integer in [1, 8], got 9",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_layer_even_where_the_layer_does_not_run(
    choice, complaint
):
    assert complaint in message(TWO_LAYERS, **choice)


def test_a_wrong_value_of_a_dense_layer_is_refused():
    assert "layer 0: top_k must be an integer in [1, 2], got 3" in message(MIXED, top_k=[3, 1, 1])


@pytest.mark.parametrize("granules", [0, -1, 3, 128])
def test_granules_that_do_not_divide_the_experts_are_refused(granules):
    with pytest.raises(RoutingError, match=f"hidden size 64, got {granules}. Use 1"):
        replace(MINI, width_granules=granules)


def test_width_is_no_axis_where_experts_have_one_granule():
    assert "expert_width must be an integer in [1, 1], got 2" in message(OLMOE, expert_width=2)


def test_a_routing_error_is_a_value_error_and_one_of_ours():
    assert issubclass(RoutingError, ValueError)
    assert issubclass(RoutingError, ElasticMoEError)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
FIELDS = ["max_depth", "active_layers", *(axis.name for axis in AXES)]


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_values_resolve_or_are_a_routing_error(choice):
    try:
        subnet = resolve(TWO_LAYERS, **choice)
    except RoutingError:
        return
    assert 1 <= subnet.depth <= 2
