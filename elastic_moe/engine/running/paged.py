"""Sequences whose keys and values are in blocks: 16 positions of one layer each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from elastic_moe_kernels.table import GrowingTable
from numpy.typing import NDArray
from torch import Tensor

from elastic_moe.engine.scheduling.block_manager import PAGE_TOKENS, Page
from elastic_moe.errors import EngineError
from elastic_moe.routing import Subnet

Ints = NDArray[np.int32]
FIRST_BLOCKS = 256


class BlockPool:
    """Blocks of keys and values, and which of them are free. It grows as needed.

    One thread at a time may take blocks; they may be given back from any.

    Args:
        new_blocks: makes room for so many blocks; the first dimension counts them.

    Attributes:
        blocks: all of them; another tensor after the pool has grown.
    """

    def __init__(self, new_blocks: Callable[[int], Tensor]) -> None:
        self.blocks = new_blocks(0)
        self.free: list[int] = []
        self._new_blocks = new_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.blocks[:0].element_size() * self.blocks.shape[1:].numel()

    def reserve(self, count: int) -> None:
        """Have room for so many blocks whose numbers, from 0 on, somebody else gives out."""
        self.blocks = self._new_blocks(count)
        self.free = []

    def take(self, count: int) -> list[int]:
        """Numbers of so many blocks."""
        if count > len(self.free):
            old = len(self.blocks)
            more = max(old, count - len(self.free), FIRST_BLOCKS)
            blocks = self._new_blocks(old + more)
            blocks[:old] = self.blocks
            self.blocks = blocks
            self.free.extend(range(old + more - 1, old - 1, -1))
        # One by one: sequences that another thread drops meanwhile give their blocks back.
        return [self.free.pop() for _ in range(count)]


class PagedSequence(ABC):
    """A sequence under one sub-network: how far it has come, and where its keys and values are.

    Attributes:
        length: tokens whose keys and values are stored.
        capacity: most tokens that it may come to.
        pool: where its blocks are.
        pages: of 16 positions that it has, in all its layers.
        subnet_row, subnet_table: its sub-network's row, once it has run, and the table.
        tables: (L, B) int32: block i of a layer holds positions 16i..16i+15; -1 for none.
    """

    def __init__(self, subnet: Subnet, capacity: int, pool: BlockPool) -> None:
        self.subnet, self.capacity, self.pool = subnet, capacity, pool
        self.length = 0
        self.tables: Ints = np.full(
            (len(subnet.layers), -(-capacity // PAGE_TOKENS)), -1, dtype=np.int32
        )
        self._layers = list(subnet.active_layers)
        self.pages = 0
        self.subnet_row: int | None = None
        self.subnet_table: GrowingTable | None = None

    def __del__(self) -> None:
        if self.subnet_row is not None and self.subnet_table is not None:
            self.subnet_table.remove(self.subnet_row)

    @abstractmethod
    def grow(self, tokens: int) -> bool:
        """Have blocks for so many more tokens; whether the tables changed since the last call."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that it holds."""
        return self.pages * len(self._layers) * self.pool.block_bytes

    def _check_capacity(self, tokens: int) -> None:
        end = self.length + tokens
        if end > self.capacity:
            raise EngineError(
                f"the sequence holds {self.capacity} positions, {end} are needed. "
                f"Open it with a larger capacity."
            )


class OwningSequence(PagedSequence):
    """Takes blocks from the pool as it grows; they go back with it."""

    def grow(self, tokens: int) -> bool:
        self._check_capacity(tokens)
        needed = -(-(self.length + tokens) // PAGE_TOKENS)
        if needed <= self.pages:
            return False
        count = needed - self.pages
        taken = self.pool.take(count * len(self._layers))
        self.tables[self._layers, self.pages : needed] = np.reshape(taken, (-1, count))
        self.pages = needed
        return True

    def __del__(self) -> None:
        super().__del__()
        used = self.tables[self._layers, : self.pages]
        self.pool.free.extend(used.flatten().tolist())


class ManagedSequence(PagedSequence):
    """Has the blocks that a block manager gave it."""

    def __init__(self, subnet: Subnet, capacity: int, pool: BlockPool) -> None:
        super().__init__(subnet, capacity, pool)
        self._changed = False

    def enter(self, pages: Sequence[Page]) -> None:
        """Take over the pages that came since the last time."""
        for number in range(self.pages, len(pages)):
            blocks = pages[number].blocks
            self.tables[self._layers, number] = blocks[: len(self._layers)]
            self._changed = True
        self.pages = len(pages)

    def restart(self, length: int) -> None:
        """Forget all pages, and begin behind so many tokens that those to come hold."""
        self.tables.fill(-1)
        self.pages, self.length, self._changed = 0, length, True

    def grow(self, tokens: int) -> bool:
        if self.length + tokens > self.capacity:
            self._check_capacity(tokens)
        changed, self._changed = self._changed, False
        return changed
