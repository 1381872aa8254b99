"""Keys and values in the order in which the C++ kernels read them.

A block is 16 positions of one layer. It holds, for each key/value head, two packed matrices (see
csrc/core/values.h): the keys, in which a position is an output and a channel an input, then the
values, in which a channel is an output and a position an input. See csrc/ops/attention.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels.arrays import (
    BITS,
    AnyDType,
    Array,
    DType,
    array,
    empty,
    to_dtype,
    value_dtype,
)
from elastic_moe_kernels.constants import BLOCK_POSITIONS, PANEL, STEP_BYTES
from elastic_moe_kernels.errors import KernelError


@dataclass(frozen=True, slots=True, eq=False)
class KVBlocks:
    """N blocks of keys and values.

    Attributes:
        data: (N, bytes) uint8, contiguous; of any kind, kept as numpy sees it.
        kv_heads: G.
        head_dim: d, even.
        dtype: of keys and values.

    Raises:
        KernelError: the data has another size than these numbers give it.
    """

    data: Array
    kv_heads: int
    head_dim: int
    dtype: DType

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", value_dtype(self.dtype, "blocks"))
        object.__setattr__(self, "data", array(self.data))
        if self.kv_heads < 1:
            raise KernelError(f"blocks must have at least one head, got {self.kv_heads}.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise KernelError(f"head_dim must be even and at least 2, got {self.head_dim}.")
        check_blocks(self.data, block_bytes(self.kv_heads, self.head_dim, self.dtype))

    def __len__(self) -> int:
        return len(self.data)

    def write(self, table: Array, start: int, keys: Array, values: Array) -> None:
        """Put a sequence's keys and values (n, G, d) at positions start..start+n-1.

        Args:
            table: (B,) integer: entry i names the block of positions 16i..16i+15.
        """
        positions = start + np.arange(len(keys))
        block, lane = array(table)[positions // BLOCK_POSITIONS], positions % BLOCK_POSITIONS
        key_view, value_view = self._views()
        n, heads, d = keys.shape
        rounded = to_dtype(array(keys), self.dtype)
        key_view[block, :, :, lane] = rounded.reshape(n, heads, d // self._depth, self._depth)
        rounded = to_dtype(array(values), self.dtype)
        padded = np.pad(rounded, ((0, 0), (0, 0), (0, _padded(d) - d)))
        value_view[block, :, :, lane // self._depth, :, lane % self._depth] = padded.reshape(
            n, heads, _padded(d) // PANEL, PANEL
        )

    def read(self, table: Array, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values (count, G, d) of a sequence's positions 0..count-1."""
        positions = np.arange(count)
        block, lane = array(table)[positions // BLOCK_POSITIONS], positions % BLOCK_POSITIONS
        key_view, value_view = self._views()
        keys = key_view[block, :, :, lane].reshape(count, self.kv_heads, self.head_dim)
        values = value_view[block, :, :, lane // self._depth, :, lane % self._depth]
        values = values.reshape(count, self.kv_heads, _padded(self.head_dim))
        return keys, values[..., : self.head_dim]

    @property
    def _depth(self) -> int:
        return STEP_BYTES // PANEL // BITS[self.dtype].itemsize

    def _views(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys (N, G, d / depth, 16, depth), values (N, G, d / 16, 16 / depth, 16, depth)."""
        count, heads, d = len(self.data), self.kv_heads, self.head_dim
        padded = _padded(d)
        numbers = self.data.view(BITS[self.dtype])
        numbers = numbers.reshape(count, heads, BLOCK_POSITIONS * (d + padded))
        keys, values = np.split(numbers, [BLOCK_POSITIONS * d], axis=-1)
        return (
            keys.reshape(count, heads, d // self._depth, BLOCK_POSITIONS, self._depth),
            values.reshape(
                count, heads, padded // PANEL, BLOCK_POSITIONS // self._depth, PANEL, self._depth
            ),
        )


def check_blocks(data: NDArray[Any], size: int) -> None:
    """Raise `KernelError` unless these are blocks of so many bytes each."""
    if data.dtype != np.uint8 or data.shape[1:] != (size,) or not data.flags.c_contiguous:
        raise KernelError(
            f"blocks must be contiguous uint8 with {size} bytes each, got {data.dtype} with "
            f"shape {data.shape}. Make them with new_blocks."
        )


def block_bytes(kv_heads: int, head_dim: int, dtype: AnyDType) -> int:
    """Bytes of one block."""
    itemsize = BITS[value_dtype(dtype, "blocks")].itemsize
    return BLOCK_POSITIONS * kv_heads * (head_dim + _padded(head_dim)) * itemsize


def new_blocks(count: int, kv_heads: int, head_dim: int, dtype: AnyDType) -> KVBlocks:
    """`count` blocks, not initialised."""
    data = empty((count, block_bytes(kv_heads, head_dim, dtype)), np.uint8)
    return KVBlocks(data, kv_heads, head_dim, dtype)


def _padded(head_dim: int) -> int:
    """Channels of values: whole panels."""
    return -(-head_dim // PANEL) * PANEL
