"""The experts of a training step on a GPU: every expert's tokens padded to one length, few kernels.

Computes what `model.moe.run_experts` computes, for a batch in which every row has the same width.
A loop over experts, as in `grouped`, would launch more kernels than the products are worth; here a
layer has four batched ones, and the host waits once per layer, to learn that length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.errors import TrainingError
from elastic_moe.model.reference.moe import Experts
from elastic_moe.train.experts.grouped import swiglu_gradient
from elastic_moe.train.experts.mixed import product


class _PaddedExperts(torch.autograd.Function):
    """Shapes: T tokens, K slots each, E experts, C places each, c channels, D hidden size.

    `place` (T, K) says which of the E*C places a slot takes, E*C for a dropped one; `source` (E*C,)
    which slot a place holds, T*K for an empty one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        place: Tensor,
        source: Tensor,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """x (T, D), weights (T, K), gate and up (E, c, D), down (E, D, c) -> (T, D)."""
        E, c, D = gate.shape
        rounded, down = _to(x, dtype), _to(down, dtype)
        gate_up = _to(torch.cat((gate, up), dim=1), dtype)  # (E, 2c, D)
        token = source.div(weights.shape[1], rounding_mode="floor")  # (E*C,), T for an empty one
        rows = _pick(rounded, token).view(E, -1, D)
        hidden = product(rows, gate_up.mT, dtype)  # (E, C, 2c)
        weight = _pick(weights.flatten(), source).view(E, -1, 1)
        weighted = F.silu(hidden[..., :c]) * hidden[..., c:] * weight  # (E, C, c)
        output = product(weighted, down.mT, dtype)  # (E, C, D)
        # Only what cannot be had again for little: 48 layers of these are alive at a time.
        saved = (rounded, weights, gate_up, down, _to(hidden, dtype), place, source, token)
        ctx.save_for_backward(*saved)
        ctx.dtype = dtype
        return _pick(output.flatten(0, 1), place.flatten()).view(*place.shape, D).sum(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weights, gate, up and down, from that of the output (T, D)."""
        rounded, weights, gate_up, down, hidden, place, source, token = ctx.saved_tensors
        E, D, c = down.shape
        dtype, grad = ctx.dtype, grad_outputs[0]
        hidden = hidden.to(grad.dtype)
        rows = _pick(rounded, token).view(E, -1, D)
        weight = _pick(weights.flatten(), source).view(E, -1, 1)
        swiglu = F.silu(hidden[..., :c]) * hidden[..., c:]  # (E, C, c)
        grad_output = _pick(_to(grad, dtype), token).view(E, -1, D)
        grad_weighted = product(grad_output, down, dtype)  # (E, C, c)
        grad_down = product(grad_output.mT, swiglu * weight, dtype)
        grad_weight = (grad_weighted * swiglu).sum(-1).flatten()  # (E*C,)
        grad_hidden = swiglu_gradient(grad_weighted.mul_(weight), hidden)
        grad_rows = product(grad_hidden, gate_up, dtype).flatten(0, 1)  # (E*C, D)
        grad_gate_up = product(grad_hidden.mT, rows, dtype)  # (E, 2c, D)
        grad_x = _pick(grad_rows, place.flatten()).view(*place.shape, D).sum(1)
        grad_weights = _pick(grad_weight, place.flatten()).view(place.shape)
        grads = (grad_gate_up[:, :c], grad_gate_up[:, c:], grad_down)
        return grad_x, grad_weights, *grads, None, None, None


def _to(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values (n, ...) at `index` (m,), zero where it is n."""
    zero = values.new_zeros(1, *values.shape[1:])
    return torch.cat((values, zero)).index_select(0, index)


def _places(ids: Tensor, counts: Tensor, experts: int, most: int) -> tuple[Tensor, Tensor]:
    """`place` and `source` of `_PaddedExperts` for `experts` experts with `most` places each."""
    flat = torch.where(ids < 0, len(counts), ids).flatten()  # (N,)
    order = flat.argsort(stable=True)  # (N,)
    expert = flat.index_select(0, order).long()
    first = torch.cat((counts.new_zeros(1), counts.cumsum(0)))  # (E + 1,)
    rank = torch.arange(len(order), device=ids.device) - first.index_select(0, expert)
    end = experts * most
    to = torch.where(expert < len(counts), expert * most + rank, end)
    place = torch.empty_like(order)
    place[order] = to
    source = order.new_full((end + 1,), len(order))
    source[to] = order
    return place.view(ids.shape), source[:end]


def run_experts_padded(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    channels: Tensor,
    experts: Experts,
    input_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `model.moe.run_experts`, if all rows have one number of channels.

    Raises:
        TrainingError: they have not.
    """
    E = experts.gate_proj.shape[0]
    bins = topk_ids.flatten().long() + 1
    counts = bins.new_zeros(E + 1).scatter_add_(0, bins, torch.ones_like(bins))[1:]  # (E,)
    extremes = torch.stack((counts.max(), topk_ids.max(), channels.min(), channels.max()))
    most, last, c, widest = extremes.tolist()
    if c != widest:
        raise TrainingError("padded experts need one width for the whole batch.")
    used = last + 1  # a pool is the first experts: the others get no places
    place, source = _places(topk_ids, counts, used, most)
    out: Tensor = _PaddedExperts.apply(  # type: ignore[no-untyped-call]
        x,
        topk_weights,
        experts.gate_proj[:used, :c],
        experts.up_proj[:used, :c],
        experts.down_proj[:used, :, :c],
        place,
        source,
        input_dtype,
    )
    return out
