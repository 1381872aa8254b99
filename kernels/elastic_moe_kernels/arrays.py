"""Arrays: what callers hand over, as numpy sees it and as the C++ extension takes it.

An array is numpy's, torch's, or any other that exports DLPack or `__array__`. This is the one
place that knows of their kinds, and torch need not be installed: a tensor is recognised by the
torch that its caller has loaded.

numpy has no bfloat16. Its bits in uint16 stand for it throughout: an array of uint16 holds
bfloat16, and a dtype goes by its name, such as "bfloat16". A function that asks for a dtype takes
torch's and numpy's too.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels.errors import KernelError

Array = Any  # a numpy array, a torch tensor, or what exports DLPack or __array__
AnyArray = TypeVar("AnyArray")
DType = Literal["bfloat16", "float32"]  # of weights, matrix inputs, keys and values
AnyDType = Any  # one of these, by name or as torch or numpy have it
BITS: dict[str, np.dtype[Any]] = {  # how numpy holds numbers of a dtype
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
NO_TORCH = "the PyTorch reference needs torch. Install it: pip install 'elastic-moe[torch]'."
ALIGNMENT = 64  # bytes
ROUNDED_AT_ONCE = 1 << 16  # numbers, whose intermediate results stay in the cache


def is_array(value: object) -> bool:
    """Whether numpy can see it as an array; a list or a number is none."""
    exports = hasattr(value, "__dlpack__") or hasattr(value, "__array__")
    return isinstance(value, np.ndarray) or (exports and not isinstance(value, (np.generic, type)))


def is_tensor(value: object) -> bool:
    """Whether it is torch's."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def array(values: Array) -> NDArray[Any]:
    """The memory of an array, or a copy from another device; bfloat16 as its bits.

    Gradients are not tracked.
    """
    if isinstance(values, np.ndarray):
        return values.view(np.uint16) if _numpy_name(values.dtype) == "bfloat16" else values
    if is_tensor(values):
        if values.requires_grad or values.device.type != "cpu":
            values = values.detach().cpu()
        torch = sys.modules["torch"]
        found: NDArray[Any] = (
            values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
        ).numpy()
        return found
    return array(np.asarray(values) if hasattr(values, "__array__") else np.from_dlpack(values))


def tensor(values: Array, device: Any = None) -> Any:
    """The same values as a torch tensor, sharing memory on the CPU; bits in uint16 as bfloat16.

    Raises:
        KernelError: torch is not installed.
    """
    torch = load_torch()
    if not is_tensor(values):
        values = torch.from_numpy(array(values))
        values = values.view(torch.bfloat16) if values.dtype == torch.uint16 else values
    return values if device is None else values.to(device)


def like(given: AnyArray, values: Array) -> AnyArray:
    """`values` as the kind that `given` is: a tensor if that is one, else numpy's."""
    found: AnyArray = tensor(values) if is_tensor(given) else array(values)  # type: ignore[assignment]
    return found


def has_torch() -> bool:
    """Whether torch is installed; does not load it."""
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # something keeps it from being loaded
        return False


def load_torch() -> Any:
    """The torch module.

    Raises:
        KernelError: it is not installed.
    """
    try:
        import torch  # deferred: the C++ kernels do without it
    except ImportError as error:
        raise KernelError(NO_TORCH) from error
    return torch


def dtype_name(dtype: object) -> str:
    """The name of a dtype of numpy, torch or by name: "float32"; uint16 is "bfloat16"."""
    if isinstance(dtype, str):
        name = dtype
    elif isinstance(dtype, (np.dtype, type)):
        name = _numpy_name(np.dtype(dtype))
    else:
        name = str(dtype).removeprefix("torch.")
    return "bfloat16" if name == "uint16" else name


@cache
def _numpy_name(dtype: np.dtype[Any]) -> str:
    """The name of a dtype, for which numpy itself takes microseconds."""
    return str(dtype.name)


def empty(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """As `np.empty`, from an address on that vectors load in one piece: a multiple of 64."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    aligned: NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return aligned


def value_dtype(dtype: object, what: str) -> DType:
    """A dtype that kernels compute in. Raises: KernelError: it is another; `what` must have it."""
    name = dtype_name(dtype)
    if name == "bfloat16":
        return "bfloat16"
    if name == "float32":
        return "float32"
    raise KernelError(f"{what} must be bfloat16 or float32, got {name}.")


def device_of(values: Array) -> str:
    """Where an array is: "cpu", or what torch says."""
    return str(values.device) if is_tensor(values) else "cpu"


def wants_gradient(values: Array) -> bool:
    """Whether it is a tensor whose gradient torch would track."""
    return bool(
        is_tensor(values) and values.requires_grad and sys.modules["torch"].is_grad_enabled()
    )


def to_dtype(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Numbers of bfloat16, float16, float32 or float64 in a dtype; ties go to even.

    The array itself where it has the dtype.
    """
    if values.dtype == BITS[dtype]:
        return values
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "bfloat16":
        return _rounded(values.astype(np.float32, copy=False))
    return values.astype(BITS[dtype], copy=False)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 as the bits of bfloat16. NaN stays NaN."""
    out = np.empty(values.shape, np.uint16)
    flat, source = out.reshape(-1), np.ascontiguousarray(values).reshape(-1)
    for first in range(0, flat.size, ROUNDED_AT_ONCE):
        part = source[first : first + ROUNDED_AT_ONCE]
        bits = part.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        nan = np.isnan(part)
        if nan.any():
            rounded[nan] = 0x7FC0
        flat[first : first + ROUNDED_AT_ONCE] = rounded
    return out
