"""NaN in everything that a sub-network does not use leaves its logits bit for bit as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import LayerSubnet, Subnet, resolve
from tests.model.random_models import IMPLEMENTATIONS, MIXED, TINY, subnets, tiny_model, tokens

MODEL = tiny_model(dtype=torch.float32)
IDS = tokens(1, 9)
SHAPE = TINY.shape


def poison(model: ElasticTransformer, used: Sequence[Subnet]) -> ElasticTransformer:
    """A copy with NaN wherever none of the sub-networks `used` may look."""
    model = copy.deepcopy(model)
    for i, layer in enumerate(model.layers):
        running = [subnet.layers[i] for subnet in used if subnet.layers[i].active]
        if not running:
            for parameter in layer.parameters():
                parameter.fill_(math.nan)
        for e in range(SHAPE.num_experts):
            channels = _channels(e, running)
            layer.mlp.experts.gate_proj[e, channels:] = math.nan
            layer.mlp.experts.up_proj[e, channels:] = math.nan
            layer.mlp.experts.down_proj[e, :, channels:] = math.nan
            if not channels:
                layer.mlp.gate.weight[e] = math.nan
    return model


def _channels(expert: int, running: list[LayerSubnet]) -> int:
    """How many of the expert's channels any of these may use; 0 where it is in no pool."""
    widths = [layer.expert_width for layer in running if expert in layer.expert_pool]
    return max(widths, default=0) * SHAPE.channels_per_granule


def count_nan(model: ElasticTransformer) -> int:
    return sum(int(parameter.isnan().sum()) for parameter in model.parameters())


CASES = {
    "prefix-of-layers": resolve(SHAPE, depth=3),
    "only-the-last-layer": resolve(SHAPE, active_layers=[4]),
    "scattered-layers": resolve(SHAPE, active_layers=[0, 2, 3]),
    "narrowest-experts": resolve(SHAPE, expert_width=1),
    "width-per-layer": resolve(SHAPE, expert_width=[1, 2, 3, 4, 1]),
    "prefix-pool": resolve(SHAPE, expert_pool=4),
    "scattered-pool": resolve(SHAPE, expert_pool=[0, 2, 5]),
    "pool-of-one": resolve(SHAPE, expert_pool=[3], top_k=1),
    "pool-per-layer": resolve(
        SHAPE, expert_pool=[[0, 1, 2], [3, 4, 5], [1, 3, 5], [0, 2, 4, 5], [0, 1, 2, 3, 4]]
    ),
    "pool-under-a-threshold": resolve(SHAPE, expert_pool=[1, 2, 4], sparsity_threshold=0.8),
    "all-axes": resolve(
        SHAPE, depth=4, expert_width=2, expert_pool=4, top_k=2, sparsity_threshold=0.5
    ),
    "all-axes-per-layer": MIXED[-1],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rounded", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("subnet", CASES.values(), ids=CASES.keys())
def test_what_a_sub_network_leaves_out_is_never_read(
    subnet: Subnet, rounded: torch.dtype | None, implementation: str
) -> None:
    model, poisoned = copy.deepcopy(MODEL), poison(MODEL, [subnet])
    assert count_nan(poisoned) > 0
    for either in (model, poisoned):
        either.set_input_dtype(rounded)
        either.set_implementation(implementation)
    want = model(IDS, subnet)
    assert torch.isfinite(want).all()
    assert torch.equal(poisoned(IDS, subnet), want)


BATCHES = {
    "depths": [resolve(SHAPE, depth=4), resolve(SHAPE, depth=1), resolve(SHAPE, depth=3)],
    "layer-sets": [resolve(SHAPE, active_layers=[0, 4]), resolve(SHAPE, active_layers=[1, 4])],
    "widths": [resolve(SHAPE, expert_width=1), resolve(SHAPE, expert_width=3)],
    "pools": [resolve(SHAPE, expert_pool=3), resolve(SHAPE, expert_pool=[1, 2, 5])],
    "widest-experts-in-the-smallest-pool": [
        resolve(SHAPE, expert_pool=[2, 3, 4], expert_width=4),
        resolve(SHAPE, expert_pool=[1, 2, 3, 4, 5], expert_width=1, top_k=2),
    ],
    "another-axis-each": [MIXED[2], MIXED[3].at_depth(2), MIXED[4], MIXED[5].at_depth(2)],
    "twice-the-same": [MIXED[-1], MIXED[-1]],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("used", BATCHES.values(), ids=BATCHES.keys())
def test_what_no_sequence_of_a_batch_uses_is_never_read(
    used: list[Subnet], implementation: str
) -> None:
    model, poisoned = copy.deepcopy(MODEL), poison(MODEL, used)
    assert count_nan(poisoned) > 0
    model.set_implementation(implementation)
    poisoned.set_implementation(implementation)
    ids = tokens(len(used), 7, seed=1)
    want = model(ids, used)
    assert torch.isfinite(want).all()
    assert torch.equal(poisoned(ids, used), want)


@settings(max_examples=20, deadline=None)
@given(used=st.lists(subnets(), min_size=1, max_size=3))
def test_random_sub_networks_never_read_what_they_leave_out(used: list[Subnet]) -> None:
    ids = tokens(len(used), 5, seed=2)
    assert torch.equal(poison(MODEL, used)(ids, used), MODEL(ids, used))


# The opposite: these tests could fail.


@pytest.mark.parametrize("name", [name for name, _ in MODEL.layers[2].named_parameters()])
def test_poison_in_any_parameter_of_an_active_layer_shows(name: str) -> None:
    model = copy.deepcopy(MODEL)
    parameter = model.layers[2].get_parameter(name)
    parameter[(0,) * parameter.dim()] = math.nan
    if "experts" in name:
        parameter[:, 0, 0] = math.nan  # some expert is chosen
    # Not `isnan`: on AVX-512, torch's attention turns NaN scores into finite outputs.
    deep, shallow = resolve(SHAPE, depth=3), resolve(SHAPE, depth=2)
    assert not torch.equal(model(IDS, deep), MODEL(IDS, deep))
    assert torch.equal(model(IDS, shallow), MODEL(IDS, shallow))


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_poison_in_the_last_channel_that_runs_shows_and_in_the_next_does_not(
    part: str, width: int
) -> None:
    last = width * SHAPE.channels_per_granule - 1
    for channel, shows in ((last, True), (last + 1, False)):
        if channel < SHAPE.expert_hidden:
            model = copy.deepcopy(MODEL)
            weight = getattr(model.layers[1].mlp.experts, part)
            weight.movedim(2 if part == "down_proj" else 1, 1)[:, channel] = math.nan
            logits = model(IDS, resolve(SHAPE, expert_width=width))
            assert bool(logits.isnan().any()) is shows


def test_poison_in_an_expert_shows_exactly_from_the_first_token_that_chose_it() -> None:
    subnet = resolve(SHAPE, active_layers=[0], top_k=2, expert_pool=[0, 2, 3, 5])
    trace = Trace()
    MODEL(IDS, subnet, trace=trace)
    for expert in range(SHAPE.num_experts):
        model = copy.deepcopy(MODEL)
        model.layers[0].mlp.experts.up_proj[expert] = math.nan
        chose = (trace.layers[0].topk_ids == expert).any(dim=1)
        assert torch.equal(model(IDS, subnet)[0].isnan().any(dim=1), chose)


def test_poison_in_the_router_row_of_any_expert_of_the_pool_shows() -> None:
    pool = [0, 2, 3, 5]
    for expert in range(SHAPE.num_experts):
        model = copy.deepcopy(MODEL)
        model.layers[1].mlp.gate.weight[expert] = math.nan
        logits = model(IDS, resolve(SHAPE, expert_pool=pool))
        assert bool(logits.isnan().any()) is (expert in pool)


def test_poison_reaches_only_the_sequence_that_uses_it() -> None:
    model = copy.deepcopy(MODEL)
    model.layers[3].self_attn.o_proj.weight[0, 0] = math.nan
    both = [resolve(SHAPE, depth=3), resolve(SHAPE, depth=4)]
    logits = model(tokens(2, 6), both)
    assert not logits[0].isnan().any()
    assert logits[1].isnan().all()
