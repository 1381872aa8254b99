"""A step of Muon, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import array
from elastic_moe_kernels.constants import TRAINING_MULTIPLE
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.training.checks import check


def muon_refusal(shape: torch.Size) -> str | None:
    """Why matrices of the last two axes of a shape cannot be stepped here; None if they can."""
    if min(shape[-2:]) % TRAINING_MULTIPLE:
        return f"matrices must have sides of multiples of {TRAINING_MULTIPLE}, got {tuple(shape)}"
    return None


def muon_step(
    params: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    steps: int = 5,
    level: str | None = None,
) -> None:
    """One step of Muon on parameters that have gradients, in place.

    Args:
        params: float32 matrices, or stacks of them, with `.grad`.
        momenta: of the same shapes.
        lr: a matrix with more rows than columns moves by lr * sqrt(rows / columns).

    Raises:
        KernelError: a tensor is of another kind, or has a side that is no multiple of 16.
    """
    grads = []
    for p, momentum in zip(params, momenta, strict=True):
        grad = p.grad
        if grad is None:
            raise KernelError(f"a parameter of shape {tuple(p.shape)} has no gradient.")
        why = muon_refusal(p.shape)
        if why is not None:
            raise KernelError(f"{why}.")
        shape = tuple(p.shape)
        check({"parameter": (p, shape), "momentum": (momentum, shape), "grad": (grad, shape)})
        grads.append(grad)
    native.extension().muon(
        native.level_index(level),
        params=[array(p) for p in params],
        momenta=[array(momentum) for momentum in momenta],
        grads=[array(grad) for grad in grads],
        lr=lr,
        beta=beta,
        weight_decay=weight_decay,
        steps=steps,
        threads=torch.get_num_threads(),
    )
