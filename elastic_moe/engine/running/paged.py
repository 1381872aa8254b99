"""Sequences as a model runner sees them: what is computed, and which blocks hold it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from elastic_moe_kernels.arrays import Array
from elastic_moe_kernels.table import GrowingTable
from numpy.typing import NDArray

from elastic_moe.engine.scheduling.block_manager import BlockTable, Page, pages_for
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
        blocks: all of them; another array after the pool has grown.
    """

    def __init__(self, new_blocks: Callable[[int], Array]) -> None:
        self.blocks = new_blocks(0)
        self.free: list[int] = []
        self._new_blocks = new_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return int(self.blocks.itemsize * math.prod(self.blocks.shape[1:]))

    def reserve(self, count: int) -> None:
        """Have so many blocks, whose numbers, from 0 on, a block manager gives out."""
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


class PagedSequence:
    """Tokens under one sub-network, and where their keys and values are. A runner only reads it.

    Attributes:
        num_computed_tokens: tokens whose keys and values are stored; set by the scheduler.
        block_table: where they are; of the block manager.
        subnet_row: of the runner's table of sub-networks; set by the runner.
    """

    __slots__ = ("__weakref__", "block_table", "num_computed_tokens", "subnet", "subnet_row")

    def __init__(self, subnet: Subnet, max_tokens: int) -> None:
        self.subnet = subnet
        self.num_computed_tokens = 0
        self.block_table = BlockTable(len(subnet.layers), subnet.active_layers, max_tokens)
        self.subnet_row: int | None = None


class OwnedSequence(PagedSequence):
    """A sequence that no scheduler knows: its runner takes blocks for it as it runs.

    Its blocks, and its place in the table of sub-networks, are free again when it is dropped.

    Args:
        capacity: tokens that it may grow to.
        pool: where its blocks are.
        subnets: the runner's table of sub-networks, if it has one.
    """

    __slots__ = ("_subnets", "capacity", "pool")

    def __init__(
        self, subnet: Subnet, capacity: int, pool: BlockPool, subnets: GrowingTable | None
    ) -> None:
        super().__init__(subnet, capacity)
        self.capacity, self.pool, self._subnets = capacity, pool, subnets

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that it holds."""
        return len(self.block_table.pages) * self.subnet.depth * self.pool.block_bytes

    def grow(self, tokens: int) -> None:
        """Have blocks for so many more tokens.

        Raises:
            EngineError: that is more than its capacity.
        """
        end = self.num_computed_tokens + tokens
        if end > self.capacity:
            raise EngineError(
                f"the sequence holds {self.capacity} positions, {end} are needed. "
                f"Open it with a larger capacity."
            )
        for _ in range(len(self.block_table.pages), pages_for(end)):
            self.block_table.append(Page(tuple(self.pool.take(self.subnet.depth))))

    def __del__(self) -> None:
        for page in self.block_table.pages:
            self.pool.free.extend(page.blocks)
        if self._subnets is not None and self.subnet_row is not None:
            self._subnets.remove(self.subnet_row)
