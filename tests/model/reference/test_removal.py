"""A sub-network computes what is left of the model after its layers, experts and channels are gone.

Two independent witnesses: smaller models made by cutting tensors, and a transformer written as
plain loops over tokens, layers and experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import LayerSubnet, Subnet, resolve
from tests.model.random_models import MIXED, TINY, assert_same, subnets, tiny_model, tokens

SHAPE = TINY.shape
MODELS = {
    "tied": tiny_model(),
    "untied": tiny_model(seed=1, tied_embeddings=False),
    "not-renormalized": tiny_model(seed=2, renormalize=False),
}
IDS = tokens(2, 11)


def cut(
    model: ElasticTransformer,
    *,
    layers: Sequence[int] = range(SHAPE.num_layers),
    pool: Sequence[int] = range(SHAPE.num_experts),
    channels: int = SHAPE.expert_hidden,
    top_k: int = SHAPE.max_top_k,
) -> ElasticTransformer:
    """A smaller model that holds copies of these layers, experts and channels, and nothing else."""
    state = {}
    for name, weight in model.named_parameters():
        path = name.split(".")
        if path[0] == "layers":
            if int(path[1]) not in layers:
                continue
            path[1] = str(list(layers).index(int(path[1])))
        if name.endswith("mlp.gate.weight"):
            weight = weight[list(pool)]
        elif name.endswith("down_proj"):
            weight = weight[list(pool)][:, :, :channels]
        elif ".experts." in name:
            weight = weight[list(pool)][:, :channels]
        state[".".join(path)] = weight.clone()
    config = replace(
        model.config,
        num_layers=len(layers),
        num_experts=len(pool),
        max_top_k=top_k,
        expert_hidden=channels,
        elastic=None,
    )
    smaller = ElasticTransformer(config).to(torch.float64)
    smaller.load_state_dict(state)
    return smaller.requires_grad_(False)


def run_full(model: ElasticTransformer, ids: Tensor) -> Tensor:
    return model(ids, Subnet.full(model.shape))


REMOVALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "last-layers": ({"depth": 2}, {"layers": [0, 1]}),
    "all-layers-but-one": ({"active_layers": [3]}, {"layers": [3]}),
    "layers-from-the-middle": ({"active_layers": [0, 2, 4]}, {"layers": [0, 2, 4]}),
    "one-expert-per-token": ({"top_k": 1}, {"top_k": 1}),
    "two-experts-per-token": ({"top_k": 2}, {"top_k": 2}),
    "quarter-of-the-channels": ({"expert_width": 1}, {"channels": 6}),
    "last-granule": ({"expert_width": 3}, {"channels": 18}),
    "last-experts": ({"expert_pool": 3}, {"pool": [0, 1, 2]}),
    "first-experts": ({"expert_pool": [3, 4, 5]}, {"pool": [3, 4, 5]}),
    "experts-from-the-middle": ({"expert_pool": [0, 2, 3, 5]}, {"pool": [0, 2, 3, 5]}),
    "all-experts-but-one": ({"expert_pool": [4], "top_k": 1}, {"pool": [4], "top_k": 1}),
    "every-axis": (
        {"active_layers": [1, 2, 4], "expert_width": 2, "expert_pool": [1, 4, 5], "top_k": 2},
        {"layers": [1, 2, 4], "channels": 12, "pool": [1, 4, 5], "top_k": 2},
    ),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("axes", "removal"), REMOVALS.values(), ids=REMOVALS.keys())
def test_sub_network_equals_the_model_with_these_parts_removed(
    axes: dict[str, Any], removal: dict[str, Any], model: ElasticTransformer
) -> None:
    got = model(IDS, resolve(model.shape, **axes))
    assert_same(got, run_full(cut(model, **removal), IDS))
    if removal:  # and the removed parts mattered
        assert (got - run_full(model, IDS)).abs().amax() > 1e-3


def run_cut_layer_by_layer(model: ElasticTransformer, subnet: Subnet, ids: Tensor) -> Tensor:
    """Logits (T, V) of one sequence, through one-layer models, each cut for its own layer."""
    x = model.embed_tokens.weight[ids]  # (T, D)
    for i in subnet.active_layers:
        layer = subnet.layers[i]
        small = cut(
            model,
            layers=[i],
            pool=layer.expert_pool,
            channels=layer.expert_width * SHAPE.channels_per_granule,
            top_k=layer.top_k,
        )
        # The stream so far goes in as an embedding table with a row per position.
        small.embed_tokens.weight = torch.nn.Parameter(x, requires_grad=False)
        x = small.last_state(torch.arange(len(ids)).unsqueeze(0), Subnet.full(small.shape))[0]
    return model.logits(x)


PER_LAYER: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": [3, 1, 2, 1, 3]},
    "width": {"expert_width": [1, 4, 2, 3, 1]},
    "pool": {"expert_pool": [[0, 1, 2], [3, 4, 5], [0, 2, 4, 5], [1, 2, 3], [0, 1, 2, 3, 5]]},
    "every-axis": {
        "active_layers": [0, 1, 3, 4],
        "top_k": [2, 1, 3, 3, 1],
        "expert_width": [2, 3, 4, 1, 4],
        "expert_pool": [[1, 5], [2], [0, 1, 2], [0, 3, 4, 5], [2, 3]],
    },
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("axes", PER_LAYER.values(), ids=PER_LAYER.keys())
def test_lists_per_layer_equal_layers_that_were_cut_one_by_one(
    axes: dict[str, Any], model: ElasticTransformer
) -> None:
    subnet = resolve(model.shape, **axes)
    got = model(IDS[:1], subnet)[0]
    assert_same(got, run_cut_layer_by_layer(model, subnet, IDS[0]))


# The model again, as loops: one token, one head, one expert at a time, in float64.


def plain_forward(
    model: ElasticTransformer, subnet: Subnet, ids: Sequence[int]
) -> tuple[Tensor, list[list[list[int]]]]:
    """Logits (T, V), and the experts that ran, best first, by layer and token."""
    config, weights = model.config, dict(model.named_parameters())
    keys: list[list[Tensor]] = [[] for _ in subnet.layers]
    values: list[list[Tensor]] = [[] for _ in subnet.layers]
    ran: list[list[list[int]]] = [[] for _ in subnet.layers]
    logits = []
    for position, token in enumerate(ids):
        x = weights["embed_tokens.weight"][token]
        for i, layer in enumerate(subnet.layers):
            if not layer.active:
                continue
            w = {
                name.removeprefix(f"layers.{i}."): weight
                for name, weight in weights.items()
                if name.startswith(f"layers.{i}.")
            }
            normed = plain_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
            x = x + plain_attention(model, w, normed, position, keys[i], values[i])
            normed = plain_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
            out, kept = plain_experts(model, w, normed, layer)
            ran[i].append(kept)
            x = x + out
        head = weights.get("lm_head.weight", weights["embed_tokens.weight"])
        logits.append(head @ plain_norm(x, weights["norm.weight"], config.rms_norm_eps))
    return torch.stack(logits), ran


def plain_norm(x: Tensor, gains: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps) * gains


def plain_rotate(x: Tensor, position: int, theta: float) -> Tensor:
    half = len(x) // 2
    exponents = torch.arange(0, len(x), 2, dtype=torch.float32) / len(x)
    angles = (torch.tensor(float(position)) * (1.0 / theta**exponents)).double()
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag))


def plain_attention(
    model: ElasticTransformer,
    w: dict[str, Tensor],
    x: Tensor,
    position: int,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    config = model.config
    d, theta, eps = config.head_dim, config.rope_theta, config.rms_norm_eps
    q = (w["self_attn.q_proj.weight"] @ x).split(d)
    k = (w["self_attn.k_proj.weight"] @ x).split(d)
    k_gains, q_gains = w["self_attn.k_norm.weight"], w["self_attn.q_norm.weight"]
    keys.append(
        torch.stack([plain_rotate(plain_norm(head, k_gains, eps), position, theta) for head in k])
    )
    values.append(torch.stack((w["self_attn.v_proj.weight"] @ x).split(d)))
    heads = []
    for h, head in enumerate(q):
        rotated = plain_rotate(plain_norm(head, q_gains, eps), position, theta)
        group = h * config.num_kv_heads // config.num_heads
        scores = [float(key[group] @ rotated) / math.sqrt(d) for key in keys]
        top = max(scores)
        shares = [math.exp(score - top) for score in scores]
        mixed = sum(share * value[group] for share, value in zip(shares, values, strict=True))
        heads.append(mixed / sum(shares))
    return w["self_attn.o_proj.weight"] @ torch.cat(heads)


def plain_experts(
    model: ElasticTransformer, w: dict[str, Tensor], x: Tensor, layer: LayerSubnet
) -> tuple[Tensor, list[int]]:
    # 1. Scores over the pool.
    router_logits = {e: float(w["mlp.gate.weight"][e] @ x) for e in layer.expert_pool}
    total = sum(math.exp(logit) for logit in router_logits.values())
    scores = {e: math.exp(logit) / total for e, logit in router_logits.items()}
    # 2. The k best, the lower index first among equals.
    selected = sorted(layer.expert_pool, key=lambda e: (-scores[e], e))[: layer.top_k]
    # 3. The threshold, against the best of the selected.
    best = max(scores[e] for e in selected)
    kept = [
        e
        for place, e in enumerate(selected)
        if place < layer.min_experts or scores[e] >= layer.sparsity_threshold * best
    ]
    # 4. Weights.
    scale = sum(scores[e] for e in kept) if model.config.renormalize else 1.0
    # 5. The first channels of each expert.
    c = layer.expert_width * TINY.expert_hidden // 4
    out = torch.zeros_like(x)
    for e in kept:
        gate, up = w["mlp.experts.gate_proj"][e, :c], w["mlp.experts.up_proj"][e, :c]
        hidden = F.silu(gate @ x) * (up @ x)
        out += scores[e] / scale * (w["mlp.experts.down_proj"][e, :, :c] @ hidden)
    return out, kept


def check_against_loops(model: ElasticTransformer, subnet: Subnet, ids: Tensor) -> None:
    trace = Trace()
    got = model(ids.unsqueeze(0), subnet, trace=trace)[0]
    want, ran = plain_forward(model, subnet, ids.tolist())
    # Looser than `assert_same`: the cosine of one angle may differ from that of many by a float32.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for layer in trace.layers:
        kept = [[e for e in row if e >= 0] for row in layer.topk_ids.tolist()]
        assert kept == ran[layer.layer]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("subnet", MIXED, ids=lambda subnet: subnet.name)
def test_sub_network_equals_plain_loops(subnet: Subnet, model: ElasticTransformer) -> None:
    check_against_loops(model, Subnet(model.shape, subnet.layers), IDS[0, :8])


@pytest.mark.parametrize("variant", ["tied", "not-renormalized"])
@pytest.mark.parametrize("min_experts", [1, 2])
@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0])
def test_threshold_equals_plain_loops(threshold: float, min_experts: int, variant: str) -> None:
    model = MODELS[variant]
    subnet = resolve(model.shape, sparsity_threshold=threshold, min_experts=min_experts)
    check_against_loops(model, subnet, IDS[1, :6])


def test_thresholds_of_these_tests_drop_some_experts_and_keep_some() -> None:
    for model in MODELS.values():
        trace = Trace()
        model(IDS, resolve(model.shape, sparsity_threshold=0.5), trace=trace)
        counts = torch.cat([(layer.topk_ids >= 0).sum(dim=1) for layer in trace.layers])
        assert {1, 2, 3} == set(counts.tolist())


@settings(max_examples=12, deadline=None)
@given(subnet=subnets())
def test_random_sub_networks_equal_plain_loops(subnet: Subnet) -> None:
    check_against_loops(MODELS["tied"], subnet, IDS[0, :5])


@settings(max_examples=12, deadline=None)
@given(subnet=subnets())
def test_random_sub_networks_without_threshold_equal_removal(subnet: Subnet) -> None:
    kept = tuple(replace(layer, sparsity_threshold=0.0) for layer in subnet.layers)
    model = MODELS["untied"]
    subnet = Subnet(model.shape, kept)
    assert_same(model(IDS[:1, :6], subnet)[0], run_cut_layer_by_layer(model, subnet, IDS[0, :6]))
