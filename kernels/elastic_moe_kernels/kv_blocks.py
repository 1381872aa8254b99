"""Keys and values in the order in which the C++ kernels read them.

A block is 16 positions of one layer. It holds, for each key/value head, the keys as one panel (a
position is an output, a channel an input: see csrc/core/values.h), then the values as 16 rows of d
channels, padded with zeros to a multiple of 16. See csrc/ops/attention.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe_kernels.constants import BLOCK_POSITIONS, PANEL, STEP_BYTES
from elastic_moe_kernels.errors import KernelError


@dataclass(frozen=True, slots=True, eq=False)
class KVBlocks:
    """N blocks of keys and values.

    Attributes:
        data: (N, bytes) uint8, contiguous.
        kv_heads: G.
        head_dim: d, even.
        dtype: of keys and values, torch.bfloat16 or torch.float32.

    Raises:
        KernelError: the data has another size than these numbers give it.
    """

    data: Tensor
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float32) or self.kv_heads < 1:
            raise KernelError(
                f"blocks must hold torch.bfloat16 or torch.float32 of at least one head, got "
                f"{self.dtype} of {self.kv_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise KernelError(f"head_dim must be even and at least 2, got {self.head_dim}.")
        size = block_bytes(self.kv_heads, self.head_dim, self.dtype)
        data = self.data
        if data.dtype != torch.uint8 or data.shape[1:] != (size,) or not data.is_contiguous():
            raise KernelError(
                f"blocks must be contiguous uint8 with {size} bytes each, got {data.dtype} with "
                f"shape {tuple(data.shape)}. Make them with new_blocks."
            )

    def __len__(self) -> int:
        return len(self.data)

    def write(self, table: Tensor, start: int, keys: Tensor, values: Tensor) -> None:
        """Put a sequence's keys and values (n, G, d) at positions start..start+n-1.

        Args:
            table: (B,) integer: entry i names the block of positions 16i..16i+15.
        """
        positions = start + torch.arange(len(keys), device=table.device)
        block, lane = table.long()[positions // BLOCK_POSITIONS], positions % BLOCK_POSITIONS
        key_view, value_view = self._views()
        key_view[block, :, :, lane] = keys.to(self.dtype).view(
            *keys.shape[:2], self.head_dim // self._depth, self._depth
        )
        padded = value_view.shape[-1] - self.head_dim
        value_view[block, :, lane] = torch.nn.functional.pad(values.to(self.dtype), (0, padded))

    def read(self, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values (count, G, d) of a sequence's positions 0..count-1."""
        positions = torch.arange(count, device=table.device)
        block, lane = table.long()[positions // BLOCK_POSITIONS], positions % BLOCK_POSITIONS
        key_view, value_view = self._views()
        keys = key_view[block, :, :, lane].flatten(-2)
        return keys, value_view[block, :, lane][..., : self.head_dim]

    @property
    def _depth(self) -> int:
        return STEP_BYTES // PANEL // self.dtype.itemsize

    def _views(self) -> tuple[Tensor, Tensor]:
        """Keys (N, G, d / depth, 16, depth) and values (N, G, 16, d padded)."""
        count, heads, d = len(self.data), self.kv_heads, self.head_dim
        padded = _padded(d)
        numbers = self.data.view(self.dtype).view(count, heads, BLOCK_POSITIONS * (d + padded))
        keys, values = numbers.tensor_split([BLOCK_POSITIONS * d], dim=-1)
        return (
            keys.view(count, heads, d // self._depth, BLOCK_POSITIONS, self._depth),
            values.view(count, heads, BLOCK_POSITIONS, padded),
        )


def block_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block."""
    padded = _padded(head_dim)
    return BLOCK_POSITIONS * kv_heads * (head_dim + padded) * dtype.itemsize


def new_blocks(count: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVBlocks:
    """`count` blocks, not initialised."""
    data = torch.empty(count, block_bytes(kv_heads, head_dim, dtype), dtype=torch.uint8)
    return KVBlocks(data, kv_heads, head_dim, dtype)


def _padded(head_dim: int) -> int:
    """Channels of a row of values: whole panels."""
    return -(-head_dim // PANEL) * PANEL
