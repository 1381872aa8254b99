"""The experts of a training step: tokens sorted by expert, few large products, hand-made gradients.

Computes what `model.moe.run_experts` computes, for a batch in which every row has the same width.
Autograd over the readable loop keeps every expert's slices; this keeps four buffers per layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.errors import TrainingError
from elastic_moe.model.reference.layers import round_to
from elastic_moe.model.reference.moe import Experts, MoE
from elastic_moe.model.reference.transformer import ElasticTransformer


class _GroupedExperts(torch.autograd.Function):
    """Shapes: T tokens, K slots each, N = T*K rows sorted by expert, c channels, D hidden size.

    What enters a product is rounded to `dtype` first, unless that is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """x (T, D), ids and weights (T, K), gate and up (E, c, D), down (E, D, c) -> (T, D)."""
        T, K = ids.shape
        E, c, D = gate.shape
        # Dropped slots (-1) sort behind the last expert and take part in no product.
        flat = torch.where(ids < 0, E, ids).flatten()
        order = flat.argsort(stable=True)  # (N,)
        ends = torch.bincount(flat, minlength=E + 1).cumsum(0).tolist()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)  # (N,) where each slot went
        token = order.div(K, rounding_mode="floor")
        rows = round_to(x, dtype).index_select(0, token)  # (N, D)
        gate_up = round_to(torch.cat((gate, up), dim=1), dtype)  # (E, 2c, D)
        down = round_to(down, dtype)
        hidden = x.new_empty(len(order), 2 * c)
        start = 0
        for e in range(E):
            torch.mm(rows[start : ends[e]], gate_up[e].T, out=hidden[start : ends[e]])
            start = ends[e]
        hidden[start:] = 0
        weight = weights.flatten().index_select(0, order).unsqueeze(1)  # (N, 1)
        product = F.silu(hidden[:, :c]) * hidden[:, c:]  # (N, c)
        weighted = round_to(product * weight, dtype)
        output = x.new_empty(len(order), D)
        start = 0
        for e in range(E):
            torch.mm(weighted[start : ends[e]], down[e].T, out=output[start : ends[e]])
            start = ends[e]
        output[start:] = 0
        ctx.save_for_backward(
            rows, hidden, product, weighted, weight, gate_up, down, order, place, token
        )
        ctx.ends, ctx.K, ctx.dtype = ends, K, dtype
        return output.index_select(0, place).view(T, K, D).sum(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weights, gate, up and down, from that of the output (T, D)."""
        rows, hidden, product, weighted, weight, gate_up, down, order, place, token = (
            ctx.saved_tensors
        )
        grad = round_to(grad_outputs[0], ctx.dtype)
        E, D, c = down.shape
        N = len(order)
        ends = ctx.ends
        grad_rows = grad.index_select(0, token)  # (N, D), gradient of each slot's output
        grad_weighted = grad.new_empty(N, c)
        grad_weighted[ends[E - 1] :] = 0
        grad_down = grad.new_empty(E, D, c)
        start = 0
        for e in range(E):
            s = slice(start, ends[e])
            torch.mm(grad_rows[s], down[e], out=grad_weighted[s])
            torch.mm(grad_rows[s].T, weighted[s], out=grad_down[e])
            start = ends[e]
        grad_weight = (grad_weighted * product).sum(1)  # (N,)
        grad_hidden = round_to(swiglu_gradient(grad_weighted.mul_(weight), hidden), ctx.dtype)
        grad_in = grad.new_empty(N, D)
        grad_in[ends[E - 1] :] = 0
        grad_gate_up = torch.empty_like(gate_up)
        start = 0
        for e in range(E):
            s = slice(start, ends[e])
            torch.mm(grad_hidden[s], gate_up[e], out=grad_in[s])
            torch.mm(grad_hidden[s].T, rows[s], out=grad_gate_up[e])
            start = ends[e]
        grad_x = grad_in.index_select(0, place).view(-1, ctx.K, D).sum(1)
        grad_weights = grad_weight.index_select(0, place).view(-1, ctx.K)
        grads = (grad_gate_up[:, :c], grad_gate_up[:, c:], grad_down)
        return grad_x, None, grad_weights, *grads, None


def swiglu_gradient(grad: Tensor, hidden: Tensor) -> Tensor:
    """From the gradient of silu(gate) * up (..., c) to that of `hidden`, gate and up (..., 2c)."""
    gates, ups = hidden.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gates)
    silu = gates * sigmoid
    result = torch.empty_like(hidden)
    grad_gates, grad_ups = result.chunk(2, dim=-1)
    torch.mul(grad, silu, out=grad_ups)
    torch.mul(grad * ups, sigmoid + silu - silu * sigmoid, out=grad_gates)
    return result


def run_experts_grouped(
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
    c = int(channels[0])
    if bool((channels != c).any()):
        raise TrainingError("grouped experts need one width for the whole batch.")
    gate: Tensor = experts.gate_proj
    up: Tensor = experts.up_proj
    down: Tensor = experts.down_proj
    if c < gate.shape[1]:
        gate, up, down = gate[:, :c], up[:, :c], down[:, :, :c]
    out: Tensor = _GroupedExperts.apply(  # type: ignore[no-untyped-call]
        x, topk_ids, topk_weights, gate, up, down, input_dtype
    )
    return out


def use_grouped(model: ElasticTransformer) -> None:
    """Have every layer of a model run its experts so."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.run_experts = run_experts_grouped
