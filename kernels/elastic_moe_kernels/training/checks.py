"""What all training kernels ask of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_moe_kernels.arrays import array
from elastic_moe_kernels.constants import TRAINING_MULTIPLE
from elastic_moe_kernels.errors import KernelError


def refusal(hidden: int, head_dim: int, expert_hidden: int) -> str | None:
    """Why these sizes cannot run here; None if they can."""
    for name, size in (("hidden", hidden), ("head", head_dim), ("expert hidden", expert_hidden)):
        if size % TRAINING_MULTIPLE:
            return f"{name} size must be a multiple of {TRAINING_MULTIPLE}, got {size}"
    return None


def check(wanted: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Refuse a tensor that is not float32 on the CPU, contiguous and of the shape beside it.

    Raises:
        KernelError: names it.
    """
    for name, (tensor, shape) in wanted.items():
        fine = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        if not fine or tensor.shape != shape or not tensor.is_contiguous():
            raise KernelError(
                f"{name} must be contiguous float32 {shape} on the CPU, got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}."
            )


def arrays(**tensors: Tensor | None) -> dict[str, Any]:
    """Tensors by name as the C++ extension takes them; None stays None."""
    return {name: None if t is None else array(t) for name, t in tensors.items()}


def save(ctx: Any, tensors: Mapping[str, Tensor | None]) -> None:
    """Keep every tensor that the backward pass reads, by name.

    No address outlives the forward pass: checkpointing and saved-tensor hooks may free a tensor
    and hand back another one in its place.
    """
    ctx.kinds = {name: None if t is None else (t.dtype, t.shape) for name, t in tensors.items()}
    ctx.save_for_backward(*tensors.values())


def restore(ctx: Any) -> dict[str, Tensor | None]:
    """The tensors that `save` kept, contiguous.

    Raises:
        KernelError: a saved-tensor hook returned another dtype, shape or device.
    """
    found: dict[str, Tensor | None] = {}
    for (name, kind), tensor in zip(ctx.kinds.items(), ctx.saved_tensors, strict=True):
        if tensor is not None and (
            (tensor.dtype, tensor.shape) != kind or tensor.device.type != "cpu"
        ):
            raise KernelError(
                f"saved tensor {name} must come back as {kind[0]} {tuple(kind[1])} on the CPU, got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}. Check the saved-tensor "
                f"hooks around this block."
            )
        found[name] = None if tensor is None else tensor.contiguous()
    return found


def gradients(
    tensors: Mapping[str, Tensor | None],
    names: Sequence[str],
    make: Callable[[Tensor], Tensor] = torch.empty_like,
) -> dict[str, Tensor | None]:
    """A tensor grad_NAME for each name, made like the tensor; None for none."""
    found = ((name, tensors[name]) for name in names)
    return {f"grad_{name}": None if tensor is None else make(tensor) for name, tensor in found}
