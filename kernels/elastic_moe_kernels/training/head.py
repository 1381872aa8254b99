"""The cross-entropy behind the head, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_moe_kernels import native
from elastic_moe_kernels.constants import TRAINING_MULTIPLE
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.training.checks import arrays, check


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, *, level: str | None = None) -> Tensor:
    """Mean cross-entropy in nats of softmax(x W^T), without logits of more than a block of rows.

    Args:
        x: (N, D) final states.
        weight: (V, D) head.
        targets: (N,) int64 in [0, V).

    Raises:
        KernelError: a tensor is of another kind or shape, or a target out of range.
    """
    N, D = x.shape
    V = weight.shape[0]
    if D % TRAINING_MULTIPLE:
        raise KernelError(f"hidden size must be a multiple of {TRAINING_MULTIPLE}, got {D}.")
    check({"x": (x, (N, D)), "weight": (weight, (V, D))})
    if targets.shape != (N,) or targets.dtype != torch.int64 or not targets.is_contiguous():
        raise KernelError(
            f"targets must be contiguous int64 ({N},), got {targets.dtype} {tuple(targets.shape)}."
        )
    if N and not 0 <= int(targets.min()) <= int(targets.max()) < V:
        raise KernelError(
            f"targets must be in [0, {V}), got {int(targets.min())} to {int(targets.max())}."
        )
    loss: Tensor = _HeadLoss.apply(x, weight, targets, native.level_index(level))  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """The gradients come with the loss, so that logits are made once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, level: int) -> Tensor:
        grads = torch.empty_like(x), torch.empty_like(weight)
        loss = native.extension().head_loss(
            level,
            **arrays(x=x, weight=weight, targets=targets, grad_x=grads[0], grad_weight=grads[1]),
            threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(*grads)
        return x.new_tensor(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_outputs[0], grad_weight * grad_outputs[0], None, None
