"""Checks of arguments that every op makes before an address is used."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from elastic_moe_kernels.errors import KernelError

FLOAT32_MAX = torch.finfo(torch.float32).max


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    dim: int,
    device: torch.device | None = None,
) -> None:
    """Raise `KernelError` unless the tensor is contiguous and as said.

    Args:
        device: of the table or the weights that it is used with; None for the first tensor of a
            call, which may be on any.
    """
    if not isinstance(tensor, Tensor):
        raise KernelError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in dtypes:
        raise KernelError(
            f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}. "
            f"Convert it with .to()."
        )
    if tensor.dim() != dim:
        raise KernelError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}.")
    if device is not None and tensor.device != device:
        raise KernelError(
            f"{name} is on {tensor.device} and the other arguments on {device}. "
            f"Move one to the other."
        )
    if not tensor.is_contiguous():
        raise KernelError(
            f"{name} must be contiguous, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}. Call .contiguous()."
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise `KernelError` unless the tensor has the shape; `why` says what gives it."""
    shape = tuple(shape)
    if tensor.shape != shape:
        raise KernelError(
            f"{name} must have shape {shape}, {why}, got shape {tuple(tensor.shape)}."
        )


def check_range(name: str, tensor: Tensor, low: int, high: int, meaning: str) -> None:
    """Raise `KernelError` unless every integer is in [low, high], naming the first that is not."""
    if not tensor.numel():
        return
    least, most = (int(end) for end in tensor.aminmax())
    if least >= low and most <= high:
        return
    at = ((tensor < low) | (tensor > high)).nonzero()[0].tolist()
    raise KernelError(
        f"{name}{at} must be in [{low}, {high}], {meaning}, got {int(tensor[tuple(at)])}."
    )


def check_number(name: str, value: float, low: float = -FLOAT32_MAX) -> None:
    """Raise `KernelError` unless it is a number in [low, FLOAT32_MAX].

    The C++ kernels compute in float32, where a larger number is infinite.
    """
    if not isinstance(value, float | int | np.floating | np.integer):
        raise KernelError(f"{name} must be a number, got {type(value).__name__}.")
    if low <= value <= FLOAT32_MAX:
        return
    least = "" if low == -FLOAT32_MAX else f" and at least {low}"
    most = f"; numbers of float32 end at {FLOAT32_MAX:.3g}" if math.isfinite(value) else ""
    raise KernelError(f"{name} must be finite{least}, got {value}{most}.")


def no_backward(*tensors: Tensor) -> str:
    """Why the C++ kernels cannot take tensors that want gradients, "" if none does."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "has no backward pass. Call it under torch.no_grad()."
    return ""
