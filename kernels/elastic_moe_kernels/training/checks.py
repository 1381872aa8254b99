"""What all training kernels ask of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe_kernels.errors import KernelError

LANES = 16  # sizes are whole vectors of so many numbers


def refusal(hidden: int, head_dim: int, expert_hidden: int) -> str | None:
    """Why these sizes cannot run here; None if they can."""
    for name, size in (("hidden", hidden), ("head", head_dim), ("expert hidden", expert_hidden)):
        if size % LANES:
            return f"{name} size must be a multiple of {LANES}, got {size}"
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


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    """Where each tensor lies; 0 for none."""
    return {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
