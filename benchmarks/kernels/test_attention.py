"""Attention over block tables: one token of many sequences, and chunks of a prompt.

Keys and values are warm as far as the caches hold them; "context" is what is there before.
"""

from __future__ import annotations

import pytest
import torch
from elastic_moe_kernels import ops
from elastic_moe_kernels.kv_blocks import new_blocks
from torch import Tensor

from benchmarks.kernels.cases import HEAD_DIM, HEADS, ROWS, relative_error
from benchmarks.kernels.conftest import Report

DECODE_CONTEXT = 512
MAX_ERROR = 0.01


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("phase", "rows"),
    [("decode", rows) for rows in ROWS[:4]] + [("prefill", rows) for rows in ROWS[2:]],
)
def test_attention(
    measure: Report, phase: str, rows: int, implementation: ops.Implementation
) -> None:
    sequences = rows if phase == "decode" else 1
    start = DECODE_CONTEXT - 1 if phase == "decode" else 0
    length = rows // sequences
    end = start + length
    per_sequence = -(-end // 16)
    blocks = new_blocks(sequences * per_sequence, HEADS, HEAD_DIM, torch.bfloat16)
    tables = torch.arange(sequences * per_sequence, dtype=torch.int32).view(sequences, -1)
    generator = torch.Generator().manual_seed(rows)
    for table in tables:
        keys, values = (torch.randn(end, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
        blocks.write(table, 0, keys, values)
    queries = torch.randn(rows, HEADS, HEAD_DIM, generator=generator)
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    starts = torch.full((sequences,), start, dtype=torch.int32)

    def call(implementation: ops.Implementation = implementation) -> Tensor:
        return ops.attention(
            queries, blocks, tables, lengths, starts, implementation=implementation
        )

    error = relative_error(call(), call("reference").double())
    assert error < MAX_ERROR
    seen = sequences * (length * start + length * (length + 1) // 2)
    measure(
        call,
        kernel="attention",
        implementation=implementation,
        rows=rows,
        moved_bytes=blocks.data.nbytes,
        flops=4 * seen * HEADS * HEAD_DIM,
        cache="warm",
        phase=phase,
        context=start,
        error=error,
    )
