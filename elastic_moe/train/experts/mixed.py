"""Matrix products whose inputs are rounded to bfloat16, forward and backward; sums are float32.

Weights, norms, router, softmax, residual stream and loss stay float32. A CUDA device multiplies
bfloat16 as it is; a CPU multiplies the rounded values in float32, which gives the same up to the
order of summation and here takes no longer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model.reference.layers import Attention, Linear
from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import ElasticTransformer


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """a (..., n, k) times b (..., k, m), both rounded to `dtype` (None: as they are) -> float32.

    Matrices, or two stacks of as many.
    """
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    if dtype is None:
        return multiply(a, b)
    a, b = a.to(dtype), b.to(dtype)
    if a.device.type == "cuda":
        return multiply(a, b, out_dtype=torch.float32)
    return multiply(a.float(), b.float())


class _Multiply(torch.autograd.Function):
    """x W^T of x (..., D) and W (N, D), in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, weight = x.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, weight)
        return product(rows, weight.T, torch.bfloat16).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2).bfloat16()  # (n, N)
        grad_x = product(grad, weight, torch.bfloat16)
        grad_weight = product(grad.T, rows, torch.bfloat16)
        return grad_x.view(*grad_outputs[0].shape[:-1], -1), grad_weight


def multiply_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., D) float32 times the transpose of weight (N, D) float32 -> (..., N) float32."""
    out: Tensor = _Multiply.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def attend_bfloat16(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """As `F.scaled_dot_product_attention`, from and to float32."""
    heads = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    return heads.float()


def use_bfloat16(model: ElasticTransformer) -> None:
    """Have every layer of a model multiply in bfloat16, but for its routers."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.multiply = multiply_bfloat16
        elif isinstance(module, Attention):
            module.attend = attend_bfloat16
        elif isinstance(module, MoE):
            module.input_dtype = torch.bfloat16
