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

import torch
from torch import Tensor

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import array
from elastic_moe_kernels.constants import PANEL, STEP_BYTES
from elastic_moe_kernels.errors import KernelError

HUGE_PAGE_BYTES = 1 << 21
UNIT_BYTES = STEP_BYTES // PANEL


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """An (outputs, inputs) matrix in panels.

    Attributes:
        data: (bytes,) uint8.
        dtype: of the values, torch.bfloat16 or torch.float32.
    """

    data: Tensor
    outputs: int
    inputs: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """E SwiGLU experts of D inputs and outputs and F hidden channels, one after the other."""

    data: Tensor
    num_experts: int
    hidden: int
    channels: int
    dtype: torch.dtype


def panels(outputs: int) -> int:
    """Panels that hold so many outputs."""
    return -(-outputs // PANEL)


def matrix_bytes(outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Bytes of a packed matrix."""
    return panels(outputs) * -(-inputs // _depth(dtype)) * STEP_BYTES


def expert_bytes(hidden: int, channels: int, dtype: torch.dtype) -> int:
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
        # The tensor keeps the mapping alive.
        self._memory = torch.frombuffer(whole, dtype=torch.uint8, offset=start, count=size_bytes)
        self._used = 0

    def take(self, size_bytes: int) -> Tensor:
        """(size_bytes,) uint8, aligned to 64."""
        start, end = self._used, self._used + size_bytes
        if end > len(self._memory):
            raise KernelError(
                f"the arena holds {len(self._memory)} bytes and {end} are needed. Make it larger."
            )
        self._used = -(-end // STEP_BYTES) * STEP_BYTES
        return self._memory[start:end]


def pack_matrix(
    parts: Tensor | Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    arena: Arena | None = None,
) -> PackedMatrix:
    """Pack an (outputs, inputs) matrix, or several with the same inputs below each other.

    Args:
        parts: bfloat16 or float32.
        dtype: to convert to; None keeps it.
        arena: where the result lies; None for memory of its own.

    Raises:
        KernelError: a part is no matrix, or its inputs or dtype differ from the first one's.
    """
    rows = [parts] if isinstance(parts, Tensor) else list(parts)
    dtype = dtype or rows[0].dtype
    inputs = rows[0].shape[-1]
    for part in rows:
        if part.dim() != 2 or part.shape[1] != inputs:
            raise KernelError(
                f"every part must be a matrix with {inputs} inputs, got shape {tuple(part.shape)}."
            )
    outputs = sum(len(part) for part in rows)
    size = matrix_bytes(outputs, inputs, dtype)
    data = arena.take(size) if arena is not None else torch.empty(size, dtype=torch.uint8)
    # Parts need not end on a panel.
    whole = rows[0] if len(rows) == 1 else torch.cat([part.to(dtype) for part in rows])
    _pack(whole, data, 0, 1, dtype)
    return PackedMatrix(data, outputs, inputs, dtype)


def pack_experts(
    experts: Iterable[tuple[Tensor, Tensor, Tensor]],
    count: int,
    hidden: int,
    channels: int,
    *,
    dtype: torch.dtype,
    arena: Arena | None = None,
) -> PackedExperts:
    """Pack `count` experts, given one by one as gate and up (F, D) and down (D, F).

    Raises:
        KernelError: there are fewer or more, or one has another shape.
    """
    each = expert_bytes(hidden, channels, dtype)
    size = count * each
    data = arena.take(size) if arena is not None else torch.empty(size, dtype=torch.uint8)
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
            _pack(gate, data, start, 2, dtype)
            _pack(up, data, start + panel, 2, dtype)
            _pack(down, data, start + gate_up, 1, dtype)
        packed += 1
    if packed != count:
        raise KernelError(f"there must be {count} experts, got {packed}.")
    return PackedExperts(data, count, hidden, channels, dtype)


def unpack_matrix(matrix: PackedMatrix) -> Tensor:
    """The (outputs, inputs) matrix again, in its dtype."""
    return _unpack(matrix.data, matrix.outputs, matrix.inputs, matrix.dtype)


def unpack_experts(experts: PackedExperts) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up (E, F, D) and down (E, D, F) again, in their dtype."""
    hidden, channels, dtype = experts.hidden, experts.channels, experts.dtype
    each = expert_bytes(hidden, channels, dtype)
    gate_up = each - matrix_bytes(hidden, channels, dtype)
    gates, ups, downs = [], [], []
    for data in experts.data.view(-1, each):
        # Gate and up alternate panel by panel.
        pairs = data[:gate_up].view(panels(channels), 2, -1)
        gates.append(_unpack(pairs[:, 0], channels, hidden, dtype))
        ups.append(_unpack(pairs[:, 1], channels, hidden, dtype))
        downs.append(_unpack(data[gate_up:], hidden, channels, dtype))
    return torch.stack(gates), torch.stack(ups), torch.stack(downs)


def _unpack(data: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    units = data.contiguous().view(dtype).view(panels(outputs), -1, PANEL, _depth(dtype))
    return units.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs].contiguous()


def _pack(matrix: Tensor, data: Tensor, start: int, panel_stride: int, dtype: torch.dtype) -> None:
    _depth(dtype)
    matrix = matrix.to(dtype)
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    native.extension().pack(array(matrix), array(data), start=start, panel_stride=panel_stride)


def _depth(dtype: torch.dtype) -> int:
    """Inputs per step."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise KernelError(
            f"packed weights must be torch.bfloat16 or torch.float32, got {dtype}. "
            f"Convert them with .to()."
        )
    return UNIT_BYTES // dtype.itemsize
