"""Tiny random models whose routing is not flat, and sub-networks of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from elastic_moe_kernels import ops
from hypothesis import strategies as st
from torch import Tensor

from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.reference.transformer import ElasticTransformer
from elastic_moe.routing import ModelShape, Subnet, resolve

# Every size differs from every other that it could be mistaken for.
TINY = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=61,
    hidden_size=32,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=6,
    max_top_k=3,
    expert_hidden=24,
    max_positions=128,
    rope_theta=10000.0,
    rms_norm_eps=1e-3,
    tied_embeddings=True,
    qk_norm="head",
    renormalize=True,
    elastic=ElasticBlock(width_granules=4),
)

needs_cpu_kernels = pytest.mark.skipif(
    not ops.available("cpu"), reason="the C++ kernels are not installed"
)
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="NOT TESTED on CUDA: this machine has none"
        ),
    ),
]


def tiny_model(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any
) -> ElasticTransformer:
    """A model of `TINY` with `changes`, ready for inference."""
    model = ElasticTransformer(replace(TINY, **changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        randomize(name, parameter.data, generator)
    return model.to(dtype).requires_grad_(False).eval()


def randomize(name: str, weight: Tensor, generator: torch.Generator, std: float = 0.2) -> None:
    """Fill a weight in place: gains of norms from U(0.5, 1.5), matrices from N(0, std)."""
    if weight.dim() == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
    else:
        router = name.endswith("mlp.gate.weight")
        weight.normal_(std=0.3 if router else std, generator=generator)


def tokens(batch: int, length: int, *, seed: int = 0, vocab_size: int = TINY.vocab_size) -> Tensor:
    """Random ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


@st.composite
def subnets(draw: st.DrawFn, shape: ModelShape = TINY.shape) -> Subnet:
    """Any sub-network: a random layer set, and k, m, width, threshold and pool for each layer."""
    L, E, G = shape.num_layers, shape.num_experts, shape.width_granules
    pools = [sorted(draw(st.sets(st.integers(0, E - 1), min_size=1))) for _ in range(L)]
    ks = [draw(st.integers(1, min(shape.max_top_k, len(pool)))) for pool in pools]
    return resolve(
        shape,
        active_layers=sorted(draw(st.sets(st.integers(0, L - 1), min_size=1))),
        top_k=ks,
        min_experts=[draw(st.integers(1, k)) for k in ks],
        expert_width=[draw(st.integers(1, G)) for _ in range(L)],
        sparsity_threshold=[draw(st.sampled_from([0.0, 0.3, 0.65, 0.9, 1.0])) for _ in range(L)],
        expert_pool=pools,
    )


# What one batch mixes: each axis alone, all at once, lists per layer, and the whole network.
MIXED = (
    resolve(TINY.shape),
    resolve(TINY.shape, depth=2),
    resolve(TINY.shape, active_layers=[1, 2, 4], top_k=1),
    resolve(TINY.shape, expert_width=2),
    resolve(TINY.shape, expert_pool=[1, 3, 4], top_k=2),
    resolve(TINY.shape, sparsity_threshold=0.7),
    resolve(
        TINY.shape,
        active_layers=[0, 3, 4],
        top_k=[1, 1, 3, 2, 3],
        min_experts=[1, 1, 1, 2, 1],
        expert_width=[4, 1, 1, 3, 2],
        sparsity_threshold=[0.0, 0.0, 0.0, 0.9, 0.5],
        expert_pool=[[5], [0], [0, 1, 2], [0, 5], [1, 2, 3, 5]],
    ),
)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal up to the order of float64 sums."""
    assert got.dtype == want.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
