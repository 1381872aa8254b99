"""C++ attention over block tables against a float64 run of the reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from elastic_moe_kernels import ops, reference
from elastic_moe_kernels.constants import BLOCK_POSITIONS
from elastic_moe_kernels.kv_blocks import KVBlocks, new_blocks
from torch import Tensor

from tests.kernels.compare import assert_as_good, assert_same_bits


@dataclass(frozen=True)
class Case:
    """Sequences of `lengths` tokens from positions `starts` on; H heads over G, d channels each."""

    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    def build(self, dtype: torch.dtype, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed + sum(self.lengths) + self.head_dim)
        ends = [a + n if n else 0 for a, n in zip(self.starts, self.lengths, strict=True)]
        counts = [-(-end // BLOCK_POSITIONS) for end in ends]
        width = max([*counts, 1])
        # Scattered over a pool with room to spare; what is not looked at names no block.
        ids = torch.randperm(sum(counts) + 3, generator=generator).to(torch.int32)
        tables = torch.full((len(counts), width), -1, dtype=torch.int32)
        blocks = new_blocks(len(ids), self.kv_heads, self.head_dim, dtype)
        blocks.data.fill(255)  # NaN
        kv = []
        for s, (count, end) in enumerate(zip(counts, ends, strict=True)):
            tables[s, :count] = ids[sum(counts[:s]) :][:count]
            size = (end, self.kv_heads, self.head_dim)
            keys = torch.randn(size, generator=generator).to(dtype)
            values = torch.randn(size, generator=generator).to(dtype)
            blocks.write(tables[s], 0, keys, values)
            kv.append((keys, values))
        size = (sum(self.lengths), self.heads, self.head_dim)
        queries = torch.randn(size, generator=generator).to(dtype).float()
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return Batch(queries, blocks, tables, lengths, torch.tensor(self.starts).int(), kv)


@dataclass(frozen=True)
class Batch:
    queries: Tensor
    blocks: KVBlocks
    tables: Tensor
    lengths: Tensor
    starts: Tensor
    kv: list[tuple[Tensor, Tensor]]

    def run(self, level: str | None, **changes: Tensor | float) -> Tensor:
        arguments = {
            "queries": self.queries,
            "blocks": self.blocks,
            "block_tables": self.tables,
            "lengths": self.lengths,
            "starts": self.starts,
        }
        return ops.attention(**{**arguments, **changes}, implementation="cpu", level=level)


CASES = {
    "first-token": Case(4, 2, 8, (1,), (0,)),
    "no-sequence": Case(4, 2, 8, (), ()),
    "sequence-without-tokens": Case(4, 2, 8, (2, 0, 3), (5, 70, 0)),
    "last-of-a-block": Case(4, 2, 8, (1,), (15,)),
    "first-of-a-block": Case(4, 2, 8, (1,), (16,)),
    "last-of-a-tile": Case(4, 2, 8, (1,), (255,)),
    "first-of-a-tile": Case(4, 2, 8, (1,), (256,)),
    "one-past-two-tiles": Case(4, 2, 8, (1,), (513,)),
    "shared-tiles": Case(8, 1, 16, (1,), (1500,)),
    "shared-tiles-that-end-together": Case(8, 1, 16, (1,), (1279,)),
    "shared-tiles-of-several-sequences": Case(6, 1, 24, (1, 1, 1), (1280, 3, 700)),
    "shared-tiles-beside-a-chunk": Case(4, 1, 8, (1, 5, 1), (1100, 600, 3)),
    "chunk-of-one-head-far-away": Case(8, 1, 64, (40,), (4070,)),
    "prefill-of-less-than-a-block": Case(4, 2, 8, (7,), (0,)),
    "prefill-over-a-tile": Case(4, 2, 8, (300,), (0,)),
    "chunk-across-a-tile": Case(6, 2, 16, (37,), (240,)),
    "chunk-of-a-prime": Case(6, 3, 16, (13,), (29,)),
    "one-head-each": Case(3, 3, 16, (5, 1), (3, 40)),
    "group-of-7": Case(7, 1, 16, (9, 1), (0, 20)),
    "group-of-16": Case(16, 1, 16, (3,), (30,)),
    "group-of-17": Case(34, 2, 16, (3,), (30,)),
    "group-of-64": Case(64, 1, 8, (3,), (30,)),
    "two-channels": Case(4, 2, 2, (5,), (14,)),
    "channels-no-vector": Case(4, 2, 6, (5,), (14,)),
    "channels-no-panel": Case(4, 2, 20, (5,), (14,)),
    "channels-36": Case(4, 4, 36, (20, 1), (0, 33)),
    "channels-96": Case(4, 1, 96, (5,), (60,)),
    "channels-128": Case(8, 2, 128, (5,), (60,)),
    "most-channels": Case(2, 1, 512, (3,), (17,)),
    "decode-and-prefill-mixed": Case(4, 2, 24, (1, 40, 1, 1, 17, 3), (300, 0, 31, 0, 16, 255)),
}


def check(case: Case, dtype: torch.dtype, level: str) -> None:
    batch = case.build(dtype)
    got = batch.run(level)
    assert got.dtype == dtype
    want, same_dtype = [], []
    queries = batch.queries.split(list(case.lengths)) if case.lengths else []
    scale = case.head_dim**-0.5
    for mine, (keys, values) in zip(queries, batch.kv, strict=True):
        want.append(reference.attention(mine.double(), keys.double(), values.double(), scale))
        same_dtype.append(reference.attention(mine, keys, values, scale).to(dtype))
    none = torch.empty(0, case.heads, case.head_dim)
    scale = max([float(v.abs().max()) for _, v in batch.kv if len(v)], default=0.0)
    want_all = torch.cat([none.double(), *want])
    assert_as_good(got, torch.cat([none, *same_dtype]), want_all, scale=scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_float64_reference(case: Case, dtype: torch.dtype, level: str) -> None:
    check(case, dtype, level)


def test_heads_see_only_their_own_keys(dtype: torch.dtype, level: str) -> None:
    """A key so large that all weight falls on it: the result is one value, to the bit."""
    case = Case(6, 3, 16, (1,), (45,))
    batch = case.build(dtype)
    keys, values = (t.clone() for t in batch.kv[0])
    keys.zero_()
    for head, position in enumerate((44, 0, 17)):
        keys[position, head] = 100.0
    batch.blocks.write(batch.tables[0], 0, keys, values)
    got = batch.run(level, queries=torch.ones_like(batch.queries))
    for head in range(6):
        assert_same_bits(got[0, head], values[(44, 0, 17)[head // 2], head // 2])


def test_scale_is_taken(level: str) -> None:
    batch = Case(4, 2, 8, (6,), (9,)).build(torch.float32)
    keys, values = (t.double() for t in batch.kv[0])
    want = reference.attention(batch.queries.double(), keys, values, 0.125)
    assert (batch.run(level, scale=0.125) - want).abs().max() < 1e-6
    assert (batch.run(level) - want).abs().max() > 1e-2


def test_sequence_does_not_depend_on_its_batch(dtype: torch.dtype, level: str) -> None:
    batch = CASES["decode-and-prefill-mixed"].build(dtype)
    whole = list(batch.run(level).split(batch.lengths.tolist()))
    queries = batch.queries.split(batch.lengths.tolist())
    for order in ([5, 4, 3, 2, 1, 0], [2, 0], [1], [4], [0]):
        got = batch.run(
            level,
            queries=torch.cat([queries[s] for s in order]),
            block_tables=batch.tables[order],
            lengths=batch.lengths[order],
            starts=batch.starts[order],
        )
        assert_same_bits(got, torch.cat([whole[s] for s in order]))


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, 24, (300,), (0,)),
        Case(17, 1, 8, (70,), (230,)),
        Case(8, 1, 16, (70,), (1000,)),
        Case(3, 3, 36, (130,), (450,)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_a_prompt_change_nothing(
    case: Case, chunk: int, dtype: torch.dtype, level: str
) -> None:
    batch = case.build(dtype)
    whole, length, start = batch.run(level), case.lengths[0], case.starts[0]
    for first in range(0, length, chunk if chunk > 1 else 23):
        mine = slice(first, min(first + chunk, length))
        got = batch.run(
            level,
            queries=batch.queries[mine],
            lengths=torch.tensor([mine.stop - first], dtype=torch.int32),
            starts=torch.tensor([start + first], dtype=torch.int32),
        )
        assert_same_bits(got, whole[mine])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "name",
    [
        "decode-and-prefill-mixed",
        "shared-tiles",
        "shared-tiles-that-end-together",
        "shared-tiles-of-several-sequences",
        "shared-tiles-beside-a-chunk",
        "chunk-of-one-head-far-away",
    ],
)
def test_thread_count_changes_nothing(name: str, dtype: torch.dtype, level: str) -> None:
    """More threads than pieces of work also share the tiles of single tokens."""
    batch = CASES[name].build(dtype)
    results = [batch.run(level, threads=count) for count in (1, 2, 3, 8)]
    for result in results[1:]:
        assert_same_bits(results[0], result)


def test_place_of_the_blocks_changes_nothing(dtype: torch.dtype, level: str) -> None:
    batch = CASES["chunk-across-a-tile"].build(dtype)
    moved = torch.randperm(len(batch.blocks), generator=torch.Generator().manual_seed(4))
    data = np.empty_like(batch.blocks.data)
    data[moved.numpy()] = batch.blocks.data
    blocks = KVBlocks(data, 2, 16, dtype)
    tables = moved.to(torch.int32)[batch.tables.long()]
    got = batch.run(level, blocks=blocks, block_tables=tables)
    assert_same_bits(got, batch.run(level))


def test_blocks_give_back_what_was_written(dtype: torch.dtype) -> None:
    blocks = new_blocks(5, 3, 10, dtype)
    blocks.data.fill(255)
    table = torch.tensor([4, 1, 0])
    keys, values = torch.randn(2, 37, 3, 10).to(dtype)
    blocks.write(table, 0, keys[:20], values[:20])
    blocks.write(table, 20, keys[20:], values[20:])
    got_keys, got_values = blocks.read(table, 37)
    assert_same_bits(got_keys, keys)
    assert_same_bits(got_values, values)
    assert (blocks.data[[2, 3]] == 255).all()


def test_reference_through_the_same_door(dtype: torch.dtype) -> None:
    batch = CASES["decode-and-prefill-mixed"].build(dtype)
    arguments = (batch.queries, batch.blocks, batch.tables, batch.lengths, batch.starts)
    theirs = ops.attention(*arguments, implementation="reference")
    assert theirs.dtype == dtype
    torch.testing.assert_close(ops.attention(*arguments), theirs, rtol=0.01, atol=0.01)
