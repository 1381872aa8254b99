"""Batches, prefixes, the KV cache, precision and counting of the reference model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_moe.errors import EngineError
from elastic_moe.model.reference.moe import Experts, run_experts
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import Subnet, resolve
from tests.model.kv_cache import KVCache
from tests.model.random_models import (
    DEVICES,
    MIXED,
    TINY,
    assert_same,
    needs_cpu_kernels,
    subnets,
    tiny_model,
    tokens,
)

SHAPE = TINY.shape
MODEL = tiny_model()
UNTIED = tiny_model(seed=1, tied_embeddings=False)
FULL = Subnet.full(SHAPE)


# Batches


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
def test_each_sequence_of_a_mixed_batch_runs_as_if_alone(
    model: ElasticTransformer, device: str
) -> None:
    model = copy.deepcopy(model).to(device)
    mixed = [Subnet(model.shape, subnet.layers) for subnet in MIXED]
    ids = tokens(len(mixed), 12).to(device)
    together = model(ids, mixed)
    for b, subnet in enumerate(mixed):
        assert_same(together[b : b + 1], model(ids[b : b + 1], subnet))


@settings(max_examples=15, deadline=None)
@given(mixed=st.lists(subnets(), min_size=2, max_size=4))
def test_random_mixed_batches_equal_each_sequence_alone(mixed: list[Subnet]) -> None:
    ids = tokens(len(mixed), 6, seed=3)
    together = MODEL(ids, mixed)
    for b, subnet in enumerate(mixed):
        assert_same(together[b : b + 1], MODEL(ids[b : b + 1], subnet))


def test_one_sub_network_for_all_equals_a_list_of_it() -> None:
    ids = tokens(3, 5)
    assert torch.equal(MODEL(ids, MIXED[2]), MODEL(ids, [MIXED[2]] * 3))


@pytest.mark.parametrize("given_subnets", [[], [FULL], [FULL] * 3], ids=len)
def test_wrong_number_of_sub_networks_is_an_error(given_subnets: list[Subnet]) -> None:
    with pytest.raises(EngineError, match=f"{len(given_subnets)} sub-networks.* 2 sequences"):
        MODEL(tokens(2, 4), given_subnets)


@pytest.mark.parametrize("changes", [{"num_layers": 7}, {"num_experts": 5}, {"expert_hidden": 48}])
def test_sub_network_of_another_model_is_an_error(changes: dict[str, Any]) -> None:
    other = Subnet.full(replace(TINY, **changes).shape)
    with pytest.raises(EngineError, match="another shape"):
        MODEL(tokens(2, 4), [FULL, other])


# Prefixes


PREFIXED: dict[str, Subnet | Sequence[Subnet]] = {
    "full": FULL,
    "all-axes": resolve(
        SHAPE, top_k=2, expert_width=3, sparsity_threshold=0.4, expert_pool=[0, 1, 4, 5]
    ),
    "per-layer": resolve(SHAPE, top_k=[1, 3, 2, 3, 1], expert_width=[4, 1, 2, 3, 4]),
    "layer-set": resolve(SHAPE, active_layers=[0, 2, 4]),
    "batch": [MIXED[0], MIXED[3], MIXED[5]],
}


@pytest.mark.parametrize("rounded", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("subnets", PREFIXED.values(), ids=PREFIXED.keys())
def test_state_after_d_layers_is_the_sub_network_cut_to_depth_d_bit_for_bit(
    subnets: Subnet | Sequence[Subnet], rounded: torch.dtype | None
) -> None:
    model = tiny_model(dtype=torch.float32)
    model.set_input_dtype(rounded)
    ids = tokens(3, 10)
    states = dict(model.states(ids, subnets))
    assert list(states) == list(range(SHAPE.num_layers + 1))
    assert torch.equal(states[0], model.embed_tokens(ids))
    for d in range(1, SHAPE.num_layers + 1):
        shallower = (
            subnets.at_depth(d)
            if isinstance(subnets, Subnet)
            else [subnet.at_depth(d) for subnet in subnets]
        )
        assert torch.equal(states[d], model.last_state(ids, shallower))
        assert torch.equal(model.logits(states[d]), model(ids, shallower))


# The KV cache


BATCHES: dict[str, list[Subnet]] = {
    "full": [FULL],
    "inactive-layers": [resolve(SHAPE, active_layers=[1, 4])],
    "all-axes-per-layer": [MIXED[-1]],
    "mixed": list(MIXED),
    "disjoint-layers": [
        resolve(SHAPE, active_layers=[0, 2]),
        resolve(SHAPE, active_layers=[1, 3, 4]),
    ],
}
CHUNKS = {
    "token-by-token": [1] * 12,
    "prefill-then-decode": [8, 1, 1, 1, 1],
    "chunks": [5, 4, 3],
    "decode-then-chunk": [1, 1, 7, 1, 2],
}


def run_in_chunks(
    model: ElasticTransformer, ids: Tensor, subnets: Sequence[Subnet], chunks: list[int]
) -> tuple[Tensor, KVCache]:
    cache = KVCache(SHAPE.num_layers, capacity=ids.shape[1])
    pieces = [model(piece, subnets, cache=cache) for piece in ids.split(chunks, dim=1)]
    return torch.cat(pieces, dim=1), cache


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("subnets", BATCHES.values(), ids=BATCHES.keys())
def test_cached_chunks_equal_one_pass(subnets: list[Subnet], chunks: list[int]) -> None:
    ids = tokens(len(subnets), 12)
    got, cache = run_in_chunks(MODEL, ids, subnets, chunks)
    assert cache.length == 12
    assert_same(got, MODEL(ids, subnets))


def test_cache_with_room_to_spare_changes_nothing() -> None:
    ids = tokens(2, 6)
    cache = KVCache(SHAPE.num_layers, capacity=50)
    first = MODEL(ids[:, :4], FULL, cache=cache)
    second = MODEL(ids[:, 4:], FULL, cache=cache)
    assert_same(torch.cat((first, second), dim=1), MODEL(ids, FULL))


@pytest.mark.parametrize("subnets", BATCHES.values(), ids=BATCHES.keys())
def test_only_active_layers_store_keys_and_values(subnets: list[Subnet]) -> None:
    _, cache = run_in_chunks(MODEL, tokens(len(subnets), 12), subnets, [8, 4])
    per_layer = 2 * 12 * SHAPE.num_kv_heads * SHAPE.head_dim * 8  # K and V, float64
    assert cache.nbytes == per_layer * sum(subnet.depth for subnet in subnets)
    assert cache.nbytes == sum(12 * subnet.kv_bytes_per_token(8) for subnet in subnets)


def test_cache_overflow_is_an_error_and_leaves_the_cache_usable() -> None:
    ids = tokens(1, 8)
    cache = KVCache(SHAPE.num_layers, capacity=8)
    MODEL(ids[:, :6], MIXED[2], cache=cache)
    with pytest.raises(EngineError, match=r"holds 8 positions, 9 are needed"):
        MODEL(ids[:, :3], MIXED[2], cache=cache)
    last = MODEL(ids[:, 6:], MIXED[2], cache=cache)
    assert_same(last, MODEL(ids, MIXED[2])[:, 6:])


def test_bf16_cache_loses_nothing_when_inputs_are_rounded_to_bf16() -> None:
    model = tiny_model(dtype=torch.float32)
    model.set_input_dtype(torch.bfloat16)
    ids = tokens(1, 8)
    logits = []
    for dtype in (None, torch.bfloat16):
        cache = KVCache(SHAPE.num_layers, capacity=8, dtype=dtype)
        chunks = [model(piece, FULL, cache=cache) for piece in ids.split([5, 1, 2], dim=1)]
        logits.append(torch.cat(chunks, dim=1))
    assert torch.equal(logits[0], logits[1])
    assert cache.nbytes == 8 * FULL.kv_bytes_per_token(2)


# Counting


def test_mean_experts_counts_what_ran_per_token_and_active_layer() -> None:
    ids = tokens(2, 4)
    trace = Trace()
    # 5 layers of k 3, and 2 layers of k 1.
    MODEL(ids, [FULL, resolve(SHAPE, active_layers=[1, 3], top_k=1)], trace=trace)
    assert [layer.layer for layer in trace.layers] == [0, 1, 2, 3, 4]
    assert [layer.router_logits.shape for layer in trace.layers] == [
        (4, 6),
        (8, 6),
        (4, 6),
        (8, 6),
        (4, 6),
    ]
    assert trace.mean_experts() == (5 * 3 + 2 * 1) / 7


def test_mean_experts_counts_what_the_threshold_left() -> None:
    trace = Trace()
    subnet = resolve(SHAPE, active_layers=[0], sparsity_threshold=0.5)
    MODEL(tokens(1, 9), subnet, trace=trace)
    best = trace.layers[0].router_logits.softmax(-1).sort(dim=-1, descending=True).values[:, :3]
    counts = [sum(float(s) >= 0.5 * float(row[0]) for s in row) for row in best]
    assert len(set(counts)) > 1
    assert trace.mean_experts() == sum(counts) / 9
    assert Trace().mean_experts() == 0.0


# Precision


def test_every_matrix_input_but_the_routers_is_rounded_to_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(dtype=torch.float32, tied_embeddings=False)
    model.set_input_dtype(torch.bfloat16)
    routers = {layer.mlp.gate.weight.data_ptr() for layer in model.layers}
    seen = {"matrix": 0, "router": 0, "attention": 0}
    linear, attention = F.linear, F.scaled_dot_product_attention

    def watch_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        out = linear(x, weight, *rest)
        assert x.dtype == out.dtype == torch.float32
        if weight.data_ptr() in routers:
            seen["router"] += 1
            assert not is_bf16(x), "the router sees the unrounded stream"
            assert not is_bf16(out), "router logits stay float32"
        else:
            seen["matrix"] += 1
            assert is_bf16(x)
        return out

    def watch_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen["attention"] += 1
        assert is_bf16(q)
        assert is_bf16(k)
        assert is_bf16(v)
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "linear", watch_linear)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watch_attention)
    trace = Trace()
    logits = model(tokens(2, 6), Subnet.full(model.shape), trace=trace)
    assert seen == {"matrix": 4 * 5 + 1, "router": 5, "attention": 5}
    assert logits.dtype == torch.float32
    assert not is_bf16(logits)
    assert all(not is_bf16(layer.router_logits) for layer in trace.layers)


def test_residual_stream_stays_float32_under_bf16_inputs() -> None:
    model = tiny_model(dtype=torch.float32)
    model.set_input_dtype(torch.bfloat16)
    for done, x in model.states(tokens(1, 6), FULL):
        assert x.dtype == torch.float32
        assert done == 0 or not is_bf16(x)


def test_tied_head_rounds_its_input_to_bf16() -> None:
    model = tiny_model(dtype=torch.float32)
    model.set_input_dtype(torch.bfloat16)
    x = torch.randn(3, TINY.hidden_size)
    want = model.norm(x).bfloat16().float() @ model.embed_tokens.weight.T
    torch.testing.assert_close(model.logits(x), want)


@pytest.mark.parametrize("rounded", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_round_their_input_and_their_hidden_channels(rounded: torch.dtype | None) -> None:
    experts = Experts(TINY).requires_grad_(False)
    for weight in experts.parameters():
        weight.normal_(std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    x = torch.randn(4, TINY.hidden_size, generator=torch.Generator().manual_seed(1))

    def cast(value: Tensor) -> Tensor:
        return value if rounded is None else value.to(rounded).float()

    gate, up, down = experts.gate_proj[2], experts.up_proj[2, :12], experts.down_proj[2, :, :12]
    hidden = F.silu(cast(x) @ gate[:12].T) * (cast(x) @ up.T)
    want = 0.25 * (cast(hidden) @ down.T)
    got = run_experts(
        x,
        topk_ids=torch.full((4, 1), 2),
        topk_weights=torch.full((4, 1), 0.25),
        channels=torch.full((4,), 12),
        experts=experts,
        input_dtype=rounded,
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def is_bf16(x: Tensor) -> bool:
    """Whether rounding to bf16 would change nothing."""
    return torch.equal(x, x.bfloat16().to(x.dtype))


# Routing kernels


@needs_cpu_kernels
def test_native_routing_gives_the_logits_of_the_reference() -> None:
    model = tiny_model(dtype=torch.float32)
    ids = tokens(len(MIXED), 12)
    results = {}
    for implementation in ("reference", "cpu"):
        model.set_implementation(implementation)
        trace = Trace()
        results[implementation] = model(ids, MIXED, trace=trace), trace
    (want, want_trace), (got, got_trace) = results["reference"], results["cpu"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(got_trace.layers, want_trace.layers, strict=True):
        assert torch.equal(ours.topk_ids, theirs.topk_ids)
