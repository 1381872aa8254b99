"""Chunks of several sequences as one flat batch, and decoding that advances one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
from elastic_moe_kernels.step import BatchArrays, PreparedStep, StepResult
from numpy.typing import NDArray

from elastic_moe.engine.running.paged import Ints
from elastic_moe.engine.running.runner import Chunk


def flatten(chunks: Sequence[Chunk], sizes: Sequence[int]) -> BatchArrays:
    """The chunks one after the other.

    Args:
        sizes: tokens of each chunk.
    """
    sequences = [chunk.sequence for chunk in chunks]
    rows = [sequence.subnet_row for sequence in sequences]
    lengths = np.array([s.num_computed_tokens for s in sequences], dtype=np.int32)
    ends = np.cumsum(sizes, dtype=np.int32)
    starts = lengths - ends + np.array(sizes, dtype=np.int32)
    return BatchArrays(
        token_ids=np.concatenate([np.asarray(c.token_ids, dtype=np.int32) for c in chunks]),
        positions=np.arange(ends[-1], dtype=np.int32) + np.repeat(starts, sizes),
        sequences=np.repeat(np.arange(len(chunks), dtype=np.int32), sizes),
        subnets=np.repeat(np.array(rows, dtype=np.int32), sizes),
        block_tables=_stack([s.block_table.blocks for s in sequences]),
        logits_rows=_wanted_rows(chunks, sizes),
    )


class Decoding:
    """A batch with one token of each sequence, from which the next step may go on.

    Args:
        step, chunks: that batch, which has run.
        tables: the block tables (S, L, B) that it reads.
        blocks: the cache that it works in.
        angles: positions whose rotary angles it knows.
    """

    def __init__(
        self,
        step: PreparedStep,
        chunks: Sequence[Chunk],
        tables: Ints,
        blocks: NDArray[np.uint8],
        angles: int,
    ) -> None:
        self._step, self._tables, self._blocks, self._angles = step, tables, blocks, angles
        # Not the sequences themselves: their blocks are free as soon as nobody else has them.
        self._sequences = [weakref.ref(chunk.sequence) for chunk in chunks]
        self._modes = [chunk.logits for chunk in chunks]
        self._computed = [chunk.sequence.num_computed_tokens + 1 for chunk in chunks]
        self._versions = [chunk.sequence.block_table.version for chunk in chunks]

    def advance(self, chunks: Sequence[Chunk], blocks: NDArray[np.uint8]) -> StepResult | None:
        """Run the next token of every sequence; None, and nothing ran, if it cannot go on so.

        It cannot if these chunks are not one token of each of its sequences in their order, if
        one has come to where the rotary angles end, or if new blocks moved the cache.
        """
        if len(chunks) != len(self._sequences) or blocks is not self._blocks:
            return None
        tokens = []
        for i, (sequence, token_ids, mode) in enumerate(chunks):
            computed = sequence.num_computed_tokens
            if (
                sequence is not self._sequences[i]()
                or len(token_ids) != 1
                or mode != self._modes[i]
                or computed != self._computed[i]
                or computed == self._angles
            ):
                return None
            tokens.append(int(token_ids[0]))
            table = sequence.block_table
            if table.version != self._versions[i]:
                self._versions[i] = table.version
                own = table.blocks
                self._tables[i, :, : own.shape[1]] = own
        result = self._step.advance(tokens)
        self._computed = [computed + 1 for computed in self._computed]
        return result


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
        elif chunk.logits != "none":
            rows.append(start + size - 1)
        start += size
    return np.array(rows, dtype=np.int32)
