"""Checks of arguments that every op makes before an address is used."""

from __future__ import annotations

import math

import numpy as np

from elastic_moe_kernels.arrays import (
    Array,
    array,
    device_of,
    dtype_name,
    is_array,
    is_tensor,
    wants_gradient,
)
from elastic_moe_kernels.errors import KernelError

FLOAT32_MAX = float(np.finfo(np.float32).max)


def check_array(
    name: str, values: Array, dtypes: tuple[str, ...], ndim: int, device: str = "cpu"
) -> Array:
    """The array, which is contiguous and as said; as numpy sees it unless it is torch's.

    Args:
        dtypes: names of those that are allowed.
        device: of the table or the weights that it is used with.

    Raises:
        KernelError: it is not.
    """
    if not is_array(values):
        raise KernelError(f"{name} must be a numpy or torch array, got {type(values).__name__}.")
    if not is_tensor(values):
        values = array(values)
    if dtype_name(values.dtype) not in dtypes:
        raise KernelError(
            f"{name} must be {' or '.join(dtypes)}, got {dtype_name(values.dtype)}. Convert it."
        )
    if values.ndim != ndim:
        raise KernelError(f"{name} must have {ndim} dimensions, got shape {tuple(values.shape)}.")
    if device_of(values) != device:
        raise KernelError(
            f"{name} is on {device_of(values)} and the other arguments on {device}. "
            f"Move one to the other."
        )
    if not is_contiguous(values):
        raise KernelError(
            f"{name} must be contiguous, got strides {_strides(values)} for shape "
            f"{tuple(values.shape)}. Copy it."
        )
    return values


def is_contiguous(values: Array) -> bool:
    """Whether the elements lie one after the other."""
    return bool(values.is_contiguous() if is_tensor(values) else values.flags.c_contiguous)


def _strides(values: Array) -> tuple[int, ...]:
    return tuple(values.stride() if is_tensor(values) else values.strides)


def check_shape(name: str, values: Array, shape: tuple[int, ...], why: str) -> None:
    """Raise `KernelError` unless the array has the shape; `why` says what gives it."""
    if tuple(values.shape) != tuple(shape):
        raise KernelError(
            f"{name} must have shape {tuple(shape)}, {why}, got shape {tuple(values.shape)}."
        )


def check_range(name: str, values: Array, low: int, high: int, meaning: str) -> None:
    """Raise `KernelError` unless every integer is in [low, high], naming the first that is not."""
    found = array(values)
    if not found.size or (found.min() >= low and found.max() <= high):
        return
    at = np.argwhere((found < low) | (found > high))[0].tolist()
    raise KernelError(
        f"{name}{at} must be in [{low}, {high}], {meaning}, got {int(found[tuple(at)])}."
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


def no_backward(*arrays: Array) -> str:
    """Why the C++ kernels cannot take arrays that want gradients, "" if none does."""
    if any(map(wants_gradient, arrays)):
        return "has no backward pass. Call it under torch.no_grad()."
    return ""
