"""Keys and values of sequences in blocks, as the C++ step reads them."""

from __future__ import annotations

import numpy as np
from elastic_moe_kernels.step import BLOCK_POSITIONS, CpuModel

from elastic_moe.engine.runner import Ints, SequenceState
from elastic_moe.errors import EngineError
from elastic_moe.routing import Subnet

FIRST_BLOCKS = 256


class BlockPool:
    """Blocks of keys and values, and which of them are free. It grows as needed."""

    def __init__(self, model: CpuModel) -> None:
        self.blocks = model.new_blocks(0)
        self.free: list[int] = []
        self._model = model

    def take(self, count: int) -> list[int]:
        """Numbers of so many blocks; if the pool has to grow, `blocks` is another tensor."""
        if count > len(self.free):
            old = len(self.blocks)
            more = max(old, count - len(self.free), FIRST_BLOCKS)
            blocks = self._model.new_blocks(old + more)
            blocks[:old] = self.blocks
            self.blocks = blocks
            self.free.extend(range(old + more - 1, old - 1, -1))
        taken = self.free[len(self.free) - count :]
        del self.free[len(self.free) - count :]
        return taken[::-1]


class PagedSequence(SequenceState):
    """A sequence whose blocks go back to the pool with it.

    Attributes:
        tables: (L, B) int32: block i of a layer holds positions 16i..16i+15; -1 for none.
    """

    def __init__(self, subnet: Subnet, capacity: int, pool: BlockPool) -> None:
        super().__init__(subnet, capacity)
        per_layer = -(-capacity // BLOCK_POSITIONS)
        layers = len(subnet.layers)
        self.tables: Ints = np.full((layers, per_layer), -1, dtype=np.int32)
        self._pool, self._layers = pool, list(subnet.active_layers)
        self._blocks = 0  # per active layer

    def grow(self, tokens: int) -> bool:
        """Have blocks for so many more tokens; whether new ones were taken."""
        end = self.length + tokens
        if end <= self._blocks * BLOCK_POSITIONS and end <= self.capacity:
            return False
        if end > self.capacity:
            raise EngineError(
                f"the sequence holds {self.capacity} positions, {end} are needed. "
                f"Open it with a larger capacity."
            )
        needed = -(-end // BLOCK_POSITIONS)
        count = needed - self._blocks
        taken = self._pool.take(count * len(self._layers))
        self.tables[self._layers, self._blocks : needed] = np.reshape(taken, (-1, count))
        self._blocks = needed
        return True

    @property
    def nbytes(self) -> int:
        return self._blocks * len(self._layers) * self._pool.blocks.shape[1]

    def __del__(self) -> None:
        used = self.tables[self._layers, : self._blocks]
        self._pool.free.extend(used.flatten().tolist())
