"""What a sub-network costs: literal numbers counted by hand, and no axis that saves by growing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.routing import ModelShape, Subnet, parse_name, resolve
from tests.routing.shapes import MINI, MIXED, OLMOE, choices, shapes

# One layer of elastic-mini: 2 x 128 x (4 + 2) x 32 = 49,152 in the projections, 2 x 32 in the
# norms of queries and keys, 2 x 128 in the norms of the residual stream, 16 x 128 in the router,
# 3 x 128 x 64 = 24,576 in an expert. The head, shared with the embedding: 4096 x 128 = 524,288.


def test_elastic_mini_stores_22_million_parameters():
    layer = 49_152 + 64 + 256 + 2_048 + 16 * 24_576
    assert layer == 444_736
    assert MINI.total_params == 48 * layer + 128 + 524_288 == 21_871_744


def test_elastic_mini_uses_8_million_parameters_per_token():
    full = Subnet.full(MINI)
    assert full.active_params == 48 * (49_152 + 64 + 256 + 2_048 + 4 * 24_576) + 128 + 524_288
    assert full.active_params == 7_715_968
    assert full.weight_bytes_per_token(2) == 15_431_936
    assert full.kv_bytes_per_token(2) == 48 * 2 * 2 * 32 * 2 == 12_288


def test_elastic_mini_computes_17_million_operations_per_token():
    matrices = 48 * (49_152 + 2_048 + 4 * 24_576) + 524_288  # multiply-adds
    attention = 48 * 2 * 64 * 4 * 32  # 64 positions, scores and values
    normed = 48 * (2 * 128 + 6 * 32) + 128  # channels, 4 operations each
    assert Subnet.full(MINI).flops_per_token(64) == 2 * (matrices + attention) + 4 * normed
    assert Subnet.full(MINI).flops_per_token(64) == 17_060_352


def test_a_reduced_elastic_mini_costs_its_own_layers_channels_and_pool():
    """36 layers, 2 experts of 48 channels, 8 rows of the router."""
    subnet = parse_name(MINI, "L36-k2-w6-t0.7-p8")
    layer = 49_152 + 64 + 256 + 8 * 128 + 2 * 3 * 128 * 48
    assert subnet.active_params == 36 * layer + 128 + 524_288 == 3_669_376
    assert subnet.flops_per_token(64) == 8_560_128
    assert subnet.kv_bytes_per_token(2) == 9_216


def test_olmoe_has_905_million_parameters_and_uses_167():
    full = Subnet.full(OLMOE)
    assert OLMOE.total_params == 904_954_880
    assert full.active_params == 167_543_808
    assert full.weight_bytes_per_token(2) == 335_087_616
    assert full.kv_bytes_per_token(2) == 32_768
    norms = 8 * (2 * 1024 + 2 * 1024) + 1024
    assert full.active_params - norms - 32_000 * 1024 == 134_742_016  # 134.7 M without the head


def test_olmoe_norms_count_all_heads():
    matrices = 8 * (4 * 1024**2 + 64 * 1024 + 8 * 3 * 1024 * 512) + 32_000 * 1024
    attention = 8 * 2 * 64 * 1024
    norms = 8 * 4 * 1024 + 1024
    assert Subnet.full(OLMOE).flops_per_token(64) == 2 * (matrices + attention) + 4 * norms
    assert Subnet.full(OLMOE).flops_per_token(64) == 337_252_352


def test_dense_layers_and_shared_experts_count_whole():
    """Hidden 4: attention 48, two norms 8, a dense MLP 60, an expert 72, a shared one 24."""
    assert MIXED.total_params == 2 * 40 + 4 + (48 + 8 + 60) + 2 * (48 + 8 + 16 + 4 * 72 + 24)
    assert Subnet.full(MIXED).active_params == 44 + 116 + 2 * (48 + 8 + 16 + 2 * 72 + 24) == 640
    subnet = resolve(MIXED, active_layers=[0, 2], top_k=1, expert_width=1, expert_pool=3)
    assert subnet.active_params == 44 + 116 + (48 + 8 + 12 + 24 + 24) == 276
    matrices, attention, normed = 276 - 20, 2 * 2 * 3 * 4, 20
    assert subnet.flops_per_token(3) == 2 * (matrices + attention) + 4 * normed == 688


def test_layers_may_cost_differently():
    subnet = resolve(MIXED, top_k=[1, 1, 2], expert_width=[3, 1, 2], expert_pool=[[0], [1], [0, 3]])
    first, second = 4 + 3 * 4 * 2, 8 + 2 * 3 * 4 * 4  # router rows, then experts
    assert subnet.active_params == 44 + 116 + 2 * (48 + 8 + 24) + first + second


def test_a_head_of_its_own_is_stored_twice_and_used_once():
    tied = ModelShape(**{**fields(MIXED), "tied_embeddings": True})
    assert MIXED.total_params - tied.total_params == 40
    assert Subnet.full(MIXED).active_params == Subnet.full(tied).active_params


def fields(shape: ModelShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def test_attention_grows_with_the_context():
    full = Subnet.full(MINI)
    assert full.flops_per_token(65) - full.flops_per_token(64) == 48 * 2 * 2 * 128


def test_the_threshold_leaves_the_bound_as_it_is():
    bound = Subnet.full(MINI)
    sparse = resolve(MINI, sparsity_threshold=0.65)
    assert sparse.active_params == bound.active_params
    assert sparse.flops_per_token(9) == bound.flops_per_token(9)


def test_a_measured_mean_saves_the_experts_that_did_not_run():
    sparse = resolve(MINI, sparsity_threshold=0.65)
    saved = 48 * 1.5 * 24_576
    assert sparse.active_params_at(2.5) == 7_715_968 - saved
    assert sparse.weight_bytes_per_token(2, mean_experts=2.5) == 2 * (7_715_968 - saved)
    assert sparse.flops_per_token(64, mean_experts=2.5) == 17_060_352 - 2 * saved


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_mean_of_k_experts_costs_the_bound(data):
    shape = data.draw(shapes())
    choice = data.draw(choices(shape))
    subnet, k = resolve(shape, **choice), float(choice["top_k"])
    assert subnet.active_params_at(k) == subnet.active_params
    assert subnet.flops_per_token(7, mean_experts=k) == subnet.flops_per_token(7)
    assert subnet.weight_bytes_per_token(2, mean_experts=k) == subnet.weight_bytes_per_token(2)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_expert_of_a_whole_model_uses_what_is_stored(data):
    shape = data.draw(shapes())
    shape = ModelShape(**{**fields(shape), "max_top_k": shape.num_experts})
    look_up = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    assert Subnet.full(shape).active_params == shape.total_params - look_up


def costs(subnet: Subnet) -> list[float]:
    return [
        subnet.active_params,
        subnet.flops_per_token(5),
        subnet.weight_bytes_per_token(2),
        subnet.kv_bytes_per_token(2),
    ]


@pytest.mark.parametrize("axis", ["layers", "top_k", "expert_width", "expert_pool"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_growing_an_axis_never_lowers_a_cost(axis, data):
    shape = data.draw(shapes(moe=True))
    small = data.draw(choices(shape))
    large = dict(small)
    if axis == "layers":
        layers = set(resolve(shape, **small).active_layers)
        layers |= data.draw(st.sets(st.integers(0, shape.num_layers - 1)))
        large.pop("depth", None)
        large["active_layers"] = sorted(layers)
    else:
        limits = {
            "top_k": min(shape.max_top_k, small["expert_pool"]),
            "expert_width": shape.width_granules,
            "expert_pool": shape.num_experts,
        }
        large[axis] = data.draw(st.integers(small[axis], limits[axis]))
    before, after = resolve(shape, **small), resolve(shape, **large)
    assert all(a <= b for a, b in zip(costs(before), costs(after), strict=True))
    if after != before:
        assert after.active_params > before.active_params


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_deeper_prefix_costs_more(data):
    shape = data.draw(shapes())
    choice = data.draw(choices(shape))
    choice.pop("active_layers", None)
    choice.pop("depth", None)
    each = [costs(resolve(shape, depth=d, **choice)) for d in range(1, shape.num_layers + 1)]
    assert each == sorted(each)
    assert len({one[0] for one in each}) == shape.num_layers
