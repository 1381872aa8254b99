"""Weights in the order in which the C++ kernels read them.

Sixteen outputs make a panel; a step of a panel is 64 bytes: two bfloat16 or one float32 of each of
its outputs. An expert is its gate and up panels, alternating, then its down panels, so that a width
slice is a prefix of all three. See csrc/core/values.h and csrc/ops/experts.h.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import (
    BITS,
    AnyDType,
    Array,
    DType,
    array,
    dtype_name,
    empty,
    is_array,
    to_dtype,
    value_dtype,
)
from elastic_moe_kernels.constants import PANEL, STEP_BYTES
from elastic_moe_kernels.errors import KernelError

HUGE_PAGE_BYTES = 1 << 21
EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # of NaN and infinity
CHECKED_AT_ONCE = 1 << 16  # values, which stay in the cache
UNIT_BYTES = STEP_BYTES // PANEL


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """An (outputs, inputs) matrix in panels.

    Attributes:
        data: (bytes,) uint8.
        dtype: of the values.
    """

    data: NDArray[np.uint8]
    outputs: int
    inputs: int
    dtype: DType


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """E SwiGLU experts of D inputs and outputs and F hidden channels, one after the other."""

    data: NDArray[np.uint8]
    num_experts: int
    hidden: int
    channels: int
    dtype: DType


def panels(outputs: int) -> int:
    """Panels that hold so many outputs."""
    return -(-outputs // PANEL)


def matrix_bytes(outputs: int, inputs: int, dtype: AnyDType) -> int:
    """Bytes of a packed matrix."""
    return panels(outputs) * -(-inputs // _depth(dtype)) * STEP_BYTES


def expert_bytes(hidden: int, channels: int, dtype: AnyDType) -> int:
    """Bytes of one packed expert."""
    gate_up = 2 * panels(channels) * -(-hidden // _depth(dtype)) * STEP_BYTES
    return gate_up + matrix_bytes(hidden, channels, dtype)


class Arena:
    """One stretch of memory on huge pages where the system has them, handed out from the front.

    Streaming weights from 4 kB pages costs a fifth of the bandwidth in look-ups of addresses.
    """

    def __init__(self, size_bytes: int) -> None:
        whole = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            whole.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        start = -address % HUGE_PAGE_BYTES
        # The array keeps the mapping alive.
        self._memory = np.frombuffer(whole, dtype=np.uint8, offset=start, count=size_bytes)
        self._used = 0

    def populate(self) -> None:
        """Have the system find its pages now, on all threads; it holds nothing yet."""
        native.extension().populate(self._memory, threads=native.default_threads())

    def take(self, size_bytes: int) -> NDArray[np.uint8]:
        """(size_bytes,) uint8, aligned to 64."""
        start, end = self._used, self._used + size_bytes
        if end > len(self._memory):
            raise KernelError(
                f"the arena holds {len(self._memory)} bytes and {end} are needed. Make it larger."
            )
        self._used = -(-end // STEP_BYTES) * STEP_BYTES
        return self._memory[start:end]


def pack_matrix(
    parts: Array | Sequence[Array],
    *,
    dtype: AnyDType | None = None,
    arena: Arena | None = None,
) -> PackedMatrix:
    """Pack an (outputs, inputs) matrix, or several with the same inputs below each other.

    Args:
        parts: bfloat16, float16 or float32.
        dtype: to convert to; None keeps it.
        arena: where the result lies; None for memory of its own.

    Raises:
        KernelError: a part is no matrix, or its inputs or dtype differ from the first one's.
    """
    rows = [array(part) for part in ([parts] if is_array(parts) else parts)]
    dtype = value_dtype(dtype or dtype_name(rows[0].dtype), "packed weights")
    inputs = rows[0].shape[-1]
    for part in rows:
        if part.ndim != 2 or part.shape[1] != inputs:
            raise KernelError(
                f"every part must be a matrix with {inputs} inputs, got shape {part.shape}."
            )
    outputs = sum(len(part) for part in rows)
    size = matrix_bytes(outputs, inputs, dtype)
    data = arena.take(size) if arena is not None else empty((size,), np.uint8)
    # Parts need not end on a panel.
    whole = rows[0] if len(rows) == 1 else np.concatenate([to_dtype(p, dtype) for p in rows])
    _pack(whole, data, 0, 1, dtype)
    return PackedMatrix(data, outputs, inputs, dtype)


def pack_experts(
    experts: Iterable[tuple[Array, Array, Array]],
    count: int,
    hidden: int,
    channels: int,
    *,
    dtype: AnyDType,
    arena: Arena | None = None,
) -> PackedExperts:
    """Pack `count` experts, given one by one as gate and up (F, D) and down (D, F).

    Raises:
        KernelError: there are fewer or more, or one has another shape.
    """
    dtype = value_dtype(dtype, "packed weights")
    each = expert_bytes(hidden, channels, dtype)
    size = count * each
    data = arena.take(size) if arena is not None else empty((size,), np.uint8)
    gate_up = each - matrix_bytes(hidden, channels, dtype)
    panel = -(-hidden // _depth(dtype)) * STEP_BYTES
    packed = 0
    for gate, up, down in experts:
        shapes = (tuple(gate.shape), tuple(up.shape), tuple(down.shape))
        if shapes != ((channels, hidden), (channels, hidden), (hidden, channels)):
            raise KernelError(
                f"expert {packed}: gate, up and down must be {(channels, hidden)} twice and "
                f"{(hidden, channels)}, got {shapes[0]}, {shapes[1]} and {shapes[2]}."
            )
        if packed < count:
            start = packed * each
            _pack(array(gate), data, start, 2, dtype)
            _pack(array(up), data, start + panel, 2, dtype)
            _pack(array(down), data, start + gate_up, 1, dtype)
        packed += 1
    if packed != count:
        raise KernelError(f"there must be {count} experts, got {packed}.")
    return PackedExperts(data, count, hidden, channels, dtype)


def all_finite(values: NDArray[Any], dtype: str) -> bool:
    """Whether no value is NaN or infinite; on all threads where the kernels are installed.

    Args:
        values: contiguous, with one axis; bfloat16 as its bits.
        dtype: "bfloat16", "float16" or "float32".
    """
    exponent = EXPONENTS[dtype]
    if not native.missing():
        found: bool = native.extension().are_finite(
            values.view(np.uint8),
            value_bytes=values.itemsize,
            exponent=exponent,
            threads=native.default_threads(),
        )
        return found
    bits = values.view(f"u{values.itemsize}")
    parts = (bits[i : i + CHECKED_AT_ONCE] for i in range(0, bits.size, CHECKED_AT_ONCE))
    return all(int((part & exponent).max()) < exponent for part in parts)


def unpack_matrix(matrix: PackedMatrix) -> NDArray[Any]:
    """The (outputs, inputs) matrix again, in its dtype."""
    return _unpack(matrix.data, matrix.outputs, matrix.inputs, matrix.dtype)


def unpack_experts(experts: PackedExperts) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """gate and up (E, F, D) and down (E, D, F) again, in their dtype."""
    hidden, channels, dtype = experts.hidden, experts.channels, experts.dtype
    each = expert_bytes(hidden, channels, dtype)
    gate_up = each - matrix_bytes(hidden, channels, dtype)
    gates, ups, downs = [], [], []
    for data in experts.data.reshape(-1, each):
        # Gate and up alternate panel by panel.
        pairs = data[:gate_up].reshape(panels(channels), 2, -1)
        gates.append(_unpack(pairs[:, 0], channels, hidden, dtype))
        ups.append(_unpack(pairs[:, 1], channels, hidden, dtype))
        downs.append(_unpack(data[gate_up:], hidden, channels, dtype))
    return np.stack(gates), np.stack(ups), np.stack(downs)


def _unpack(data: NDArray[np.uint8], outputs: int, inputs: int, dtype: DType) -> NDArray[Any]:
    numbers = np.ascontiguousarray(data).view(BITS[dtype])
    units = numbers.reshape(panels(outputs), -1, PANEL, _depth(dtype)).swapaxes(1, 2)
    rows = units.reshape(panels(outputs) * PANEL, -1)
    return np.ascontiguousarray(rows[:outputs, :inputs])


def _pack(
    matrix: NDArray[Any], data: NDArray[np.uint8], start: int, panel_stride: int, dtype: DType
) -> None:
    matrix = to_dtype(matrix, dtype)
    if matrix.strides[1] != matrix.itemsize:
        matrix = np.ascontiguousarray(matrix)
    native.extension().pack(
        matrix, data, start=start, panel_stride=panel_stride, threads=native.default_threads()
    )


def _depth(dtype: object) -> int:
    """Inputs per step."""
    return UNIT_BYTES // BITS[value_dtype(dtype, "packed weights")].itemsize
