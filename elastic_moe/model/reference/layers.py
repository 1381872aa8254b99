"""The parts of a decoder layer that are not routed: norm, rotary positions, attention, dense MLP.

Shapes: B sequences, T tokens of each, D hidden size, H query heads, G key/value heads, d head size,
S positions in the cache. The residual stream, norms, angles and softmax are float32 whatever the
dtype of the matrix inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig

RopeStyle = Literal["half", "interleaved"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Linear(nn.Module):
    """y = x W^T without bias; x is first rounded to `input_dtype`, products accumulate in float32.

    The weight keeps the dtype of its file and is widened for the product (to float64 in tests).
    Rounding the inputs to bf16 then gives what a bf16 x bf16 -> float32 matrix unit gives, up to
    the order of summation. `multiply` may be exchanged for another that computes the same.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.input_dtype: torch.dtype | None = None
        self.multiply: Callable[[Tensor, Tensor], Tensor] = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(round_to(x, self.input_dtype), self.weight.to(x.dtype))


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., D) times the transpose of weight (N, D) -> (..., N)."""
    return F.linear(x, weight)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): a dense layer, or the experts that every token runs."""

    def __init__(self, hidden_size: int, channels: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, channels)
        self.up_proj = Linear(hidden_size, channels)
        self.down_proj = Linear(channels, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def round_to(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x with its values rounded to `dtype`, still stored in x's own dtype; None leaves it alone."""
    return x if dtype is None or dtype == x.dtype else x.to(dtype).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: RopeStyle) -> Tensor:
    """Rotate pairs of channels of x (B, H, T, d) by angles (T, d/2).

    Pair i is (i, i + d/2) in style 'half', (2i, 2i + 1) in style 'interleaved'.
    """
    if rope == "half":
        first, second = x.chunk(2, dim=-1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, -1) if rope == "half" else torch.stack(turned, -1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of q (B, H, T, d) to k and v (B, G, S, d) -> (B, H, T, d)."""
    return F.scaled_dot_product_attention(q, k, v, **options)


class LayerStore(Protocol):
    """Keys and values of one layer for a batch of sequences."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, d) keys and values behind those that are there; return all of them."""


class Attention(nn.Module):
    """Causal grouped-query attention, with norms on queries and keys where the model has them.

    `attend` may be exchanged for another that computes the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.rope = config.head_dim, config.rope
        self.norm_spans_heads = config.qk_norm == "all"
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            q_heads, k_heads = (
                (config.num_heads, config.num_kv_heads) if self.norm_spans_heads else (1, 1)
            )
            self.q_norm = RMSNorm(q_heads * config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(k_heads * config.head_dim, config.rms_norm_eps)
        self.input_dtype: torch.dtype | None = None
        self.attend: Callable[..., Tensor] = attend

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerStore | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). With a cache, its positions come before x's."""
        B, T, _ = x.shape
        q = self._heads(self.q_proj(x), self.q_norm)  # (B, H, T, d)
        k = self._heads(self.k_proj(x), self.k_norm)  # (B, G, T, d)
        v = self._heads(self.v_proj(x), None)  # (B, G, T, d)
        q = round_to(rotate(q, cos, sin, self.rope), self.input_dtype)
        k = round_to(rotate(k, cos, sin, self.rope), self.input_dtype)
        v = round_to(v, self.input_dtype)
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, d)
            if 1 < T < k.shape[2]:
                mask = causal_mask(T, k.shape[2], x.device)
        heads = self.attend(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=True
        )
        out: Tensor = self.o_proj(heads.transpose(1, 2).reshape(B, T, -1))
        return out

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """x (B, T, n*d) -> heads (B, n, T, d), normed over all heads or over each."""
        if norm is not None and self.norm_spans_heads:
            x = norm(x)
        x = x.view(*x.shape[:-1], -1, self.head_dim)  # (B, T, n, d)
        if norm is not None and not self.norm_spans_heads:
            x = norm(x)
        return x.transpose(1, 2)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last query sees every key, the one before all but the last."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
