"""The C++ step behind the interface of `runner`: block tables, tables of sub-networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from elastic_moe_kernels.step import BLOCK_POSITIONS, CpuModel
from elastic_moe_kernels.table import SubnetTable
from torch import Tensor

from elastic_moe.engine.runner import Chunk, Ints, Progress, Runner, SequenceState, StepOutput
from elastic_moe.errors import EngineError
from elastic_moe.model.checkpoint import DTypeName, load_config, load_model
from elastic_moe.model.layers import rotary_angles
from elastic_moe.model.native import load_packed, pack_model
from elastic_moe.model.ranking import rank_channels, reorder_channels
from elastic_moe.model.transformer import build_table
from elastic_moe.routing import Subnet

TABLES_KEPT = 64
FIRST_BLOCKS = 256
FIRST_ANGLES = 1024


class NativeRunner(Runner):
    """A packed model; steps mix sequences, chunk lengths and sub-networks freely."""

    backend = "cpu"

    def __init__(self, folder: Path, dtype: DTypeName = "auto", level: str | None = None) -> None:
        self.folder = folder
        self.config = load_config(folder)
        self.model: CpuModel = load_packed(folder, dtype=dtype, level=level)
        self.dtype = self.model.dtype
        self.device = torch.device("cpu")
        self._pool = _BlockPool(self.model)
        self._angles = 0  # positions whose rotary angles the model has
        self._tables: OrderedDict[tuple[str, ...], SubnetTable] = OrderedDict()  # by fingerprint

    def open(self, subnet: Subnet, capacity: int) -> SequenceState:
        return _Paged(subnet, capacity, self._pool)

    def run(
        self, chunks: Sequence[Chunk], *, states_after: Iterable[int] = (), trace: bool = False
    ) -> StepOutput:
        """As `Runner.run`; all chunks in one native step."""
        wanted = sorted(set(states_after))
        sizes = [len(chunk.token_ids) for chunk in chunks]
        paged = [_own(chunk.sequence) for chunk in chunks]
        if not paged:
            return StepOutput(torch.empty(0, self.config.vocab_size))
        for sequence, size in zip(paged, sizes, strict=True):
            sequence.grow(size)
            self._extend_angles(sequence.length + size)
        batch = _one(chunks[0], paged[0]) if len(chunks) == 1 else _many(chunks, paged, sizes)
        distinct = {s.subnet.fingerprint: s.subnet for s in paged}
        result = self.model.step(
            batch.token_ids,
            batch.positions,
            batch.sequences,
            batch.subnets,
            self._table(distinct),
            self._pool.blocks,
            batch.block_tables,
            batch.logits_rows,
            states_after=wanted,
            trace=trace,
        )
        for sequence, size in zip(paged, sizes, strict=True):
            sequence.length += size
        out = StepOutput(
            result.logits,
            experts_run=result.counters.experts_run,
            rows_routed=result.counters.rows_routed,
            finite=bool(result.counters.finite),
            counters=result.counters,
        )
        if result.states is not None:
            out.states = dict(zip(wanted, result.states, strict=True))
        if result.topk_ids is not None:
            for layer in sorted(self.config.moe_layers):
                ran = [s.subnet.layers[layer].active for s in paged]
                if any(ran):
                    rows = torch.from_numpy(np.repeat(np.array(ran), sizes))
                    out.count(layer, result.topk_ids[layer][rows], self.config.num_experts)
        return out

    def logits(self, states: Tensor) -> Tensor:
        return self.model.logits(states)

    def rank_channels(
        self, windows: Sequence[Sequence[int]], progress: Progress
    ) -> dict[int, Tensor]:
        # The reference ranks: this runs once, and packed weights are not for looking at.
        name: DTypeName = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        model = load_model(self.folder, dtype=name)
        order = rank_channels(model, windows, progress)
        reorder_channels(model, order)
        self.model = pack_model(model, self.model.level)
        self._angles = 0
        return order

    def _extend_angles(self, positions: int) -> None:
        """Have rotary angles for so many positions; long contexts need many and are rare."""
        if positions > self._angles:
            self._angles = max(positions, 2 * self._angles, FIRST_ANGLES)
            every = torch.arange(self._angles)
            self.model.set_angles(
                *rotary_angles(every, self.config.head_dim, self.config.rope_theta)
            )

    def _table(self, distinct: dict[str, Subnet]) -> SubnetTable:
        """The kernels' table of these sub-networks; making one takes longer than a small step."""
        fingerprints = tuple(distinct)
        table = self._tables.get(fingerprints)
        if table is None:
            table = self._tables[fingerprints] = build_table(list(distinct.values()))
            if len(self._tables) > TABLES_KEPT:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(fingerprints)
        return table


class _Flat(NamedTuple):
    """A batch as `CpuModel.step` takes it."""

    token_ids: Ints
    positions: Ints
    sequences: Ints
    subnets: Ints
    block_tables: Ints
    logits_rows: Ints


def _one(chunk: Chunk, sequence: _Paged) -> _Flat:
    """A batch of one chunk: decoding one sequence is made of these, so they are made quickly."""
    size = len(chunk.token_ids)
    zeros = np.zeros(size, dtype=np.int32)  # the first and only one
    rows = zeros[:0] if chunk.logits == "none" else np.arange(size, dtype=np.int32)
    return _Flat(
        np.array(chunk.token_ids, dtype=np.int32),
        np.arange(sequence.length, sequence.length + size, dtype=np.int32),
        zeros,
        zeros,
        sequence.tables[np.newaxis],
        rows[-1:] if chunk.logits == "last" else rows,
    )


def _many(chunks: Sequence[Chunk], paged: Sequence[_Paged], sizes: Sequence[int]) -> _Flat:
    """A batch of several chunks, one after the other."""
    fingerprints = dict.fromkeys(s.subnet.fingerprint for s in paged)
    distinct = {fingerprint: number for number, fingerprint in enumerate(fingerprints)}
    own = np.array([distinct[s.subnet.fingerprint] for s in paged], dtype=np.int32)
    ends = np.cumsum(sizes, dtype=np.int32)
    starts = np.array([s.length for s in paged], dtype=np.int32) - ends + np.array(sizes, np.int32)
    return _Flat(
        np.concatenate([np.asarray(c.token_ids, dtype=np.int32) for c in chunks]),
        np.arange(ends[-1], dtype=np.int32) + np.repeat(starts, sizes),
        np.repeat(np.arange(len(chunks), dtype=np.int32), sizes),
        np.repeat(own, sizes),
        _stack([s.tables for s in paged]),
        _wanted_rows(chunks, sizes),
    )


class _BlockPool:
    """Blocks of keys and values, and which of them are free. It grows as needed."""

    def __init__(self, model: CpuModel) -> None:
        self.blocks = model.new_blocks(0)
        self.free: list[int] = []
        self._model = model

    def take(self, count: int) -> list[int]:
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


class _Paged(SequenceState):
    """Its blocks go back to the pool with it."""

    def __init__(self, subnet: Subnet, capacity: int, pool: _BlockPool) -> None:
        super().__init__(subnet, capacity)
        per_layer = -(-capacity // BLOCK_POSITIONS)
        layers = len(subnet.layers)
        self.tables: Ints = np.full((layers, per_layer), -1, dtype=np.int32)
        self._pool, self._layers = pool, list(subnet.active_layers)
        self._blocks = 0  # per active layer

    def grow(self, tokens: int) -> None:
        """Have blocks for so many more tokens."""
        end = self.length + tokens
        if end > self.capacity:
            raise EngineError(
                f"the sequence holds {self.capacity} positions, {end} are needed. "
                f"Open it with a larger capacity."
            )
        needed = -(-end // BLOCK_POSITIONS)
        if needed > self._blocks:
            count = needed - self._blocks
            taken = self._pool.take(count * len(self._layers))
            self.tables[self._layers, self._blocks : needed] = np.reshape(taken, (-1, count))
            self._blocks = needed

    @property
    def nbytes(self) -> int:
        return self._blocks * len(self._layers) * self._pool.blocks.shape[1]

    def __del__(self) -> None:
        used = self.tables[self._layers, : self._blocks]
        self._pool.free.extend(used.flatten().tolist())


def _own(sequence: SequenceState) -> _Paged:
    if not isinstance(sequence, _Paged):
        raise EngineError("the sequence was opened by another runner. Open it with this one.")
    return sequence


def _stack(tables: Sequence[Ints]) -> Ints:
    """Tables (L, B) of several sequences, padded to the longest: (S, L, B)."""
    longest = max(table.shape[1] for table in tables)
    stacked = np.full((len(tables), len(tables[0]), longest), -1, dtype=np.int32)
    for row, table in zip(stacked, tables, strict=True):
        row[:, : table.shape[1]] = table
    return stacked


def _wanted_rows(chunks: Sequence[Chunk], sizes: Sequence[int]) -> Ints:
    """Which rows of the flat batch give logits."""
    rows: list[int] = []
    start = 0
    for chunk, size in zip(chunks, sizes, strict=True):
        if chunk.logits == "all":
            rows.extend(range(start, start + size))
        elif chunk.logits == "last":
            rows.append(start + size - 1)
        start += size
    return np.array(rows, dtype=np.int32)
