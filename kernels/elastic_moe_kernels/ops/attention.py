"""Causal attention over blocks of keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import (
    BITS,
    AnyArray,
    Array,
    array,
    like,
    tensor,
    to_dtype,
)
from elastic_moe_kernels.constants import BLOCK_POSITIONS, MAX_HEAD_DIM, MAX_HEADS_PER_GROUP
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.kv_blocks import KVBlocks
from elastic_moe_kernels.ops.checks import (
    check_array,
    check_number,
    check_range,
    check_shape,
    no_backward,
)
from elastic_moe_kernels.ops.dispatch import Implementation, choose, load_reference


def attention(
    queries: AnyArray,
    blocks: KVBlocks,
    block_tables: Array,
    lengths: Array,
    starts: Array,
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> AnyArray:
    """Causal grouped-query attention of S sequences over their cached positions.

    Args:
        queries: (T, H, d) float32, contiguous, rotated: of sequence 0's tokens, then 1's, and so
            on; d even, H at most 64 times the key/value heads G.
        blocks: keys and values. Those of a sequence's positions up to its last query's are there.
        block_tables: (S, B) int32, contiguous: entry i names the block of positions 16i..16i+15.
        lengths: (S,) int32 >= 0, tokens of each sequence; their sum is T.
        starts: (S,) int32 >= 0, position of each sequence's first token here.
        scale: of the scores, finite in float32; None for 1 / sqrt(d).
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `native.level()`.
        threads: that take part at most; None for `default_threads`.

    Returns:
        (T, H, d) in the dtype of the blocks.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    if not isinstance(blocks, KVBlocks):
        raise KernelError(f"blocks must be KVBlocks, got {type(blocks).__name__}.")
    asked = check_array("queries", queries, ("float32",), 3)
    block_tables = array(check_array("block_tables", block_tables, ("int32",), 2))
    lengths = array(check_array("lengths", lengths, ("int32",), 1))
    starts = array(check_array("starts", starts, ("int32",), 1))
    sequences, width = block_tables.shape
    check_shape("lengths", lengths, (sequences,), "one entry for each row of block_tables")
    check_shape("starts", starts, (sequences,), "one entry for each row of block_tables")
    _check_heads(asked, blocks)
    rows, most = len(asked), width * BLOCK_POSITIONS
    check_range("lengths", lengths, 0, rows, "tokens of a sequence")
    if int(lengths.sum()) != rows:
        raise KernelError(
            f"lengths must add up to the {rows} rows of queries, got {int(lengths.sum())}."
        )
    runs = lengths > 0
    first = np.where(runs, starts, 0)
    check_range("starts", first, 0, max(most - 1, 0), "positions that block_tables covers")
    ends = first + lengths
    if (ends > most).any():
        at = int((ends > most).argmax())
        raise KernelError(
            f"sequence {at} ends at position {int(ends[at]) - 1}, but its row of block_tables "
            f"covers positions 0 to {most - 1}. Give it more blocks."
        )
    begins = np.arange(width, dtype=np.int32) * BLOCK_POSITIONS  # (B,)
    read = (begins < ends[:, None]) & runs[:, None]  # (S, B): no other entry is read
    check_range(
        "block_tables", np.where(read, block_tables, 0), 0, max(len(blocks) - 1, 0), "the blocks"
    )
    if not len(blocks) and read.any():
        raise KernelError("blocks must hold at least one block, got 0.")
    scale = blocks.head_dim**-0.5 if scale is None else scale
    check_number("scale", scale)
    count = native.check_threads(threads)

    if choose(implementation, no_backward(asked), level) == "cpu":
        result = attention_native(
            array(asked),
            blocks,
            block_tables,
            lengths,
            starts,
            scale=scale,
            level=level,
            threads=count,
        )
        return like(queries, result)
    out = np.empty(asked.shape, BITS[blocks.dtype])
    row = 0
    for table, length, end in zip(block_tables, lengths.tolist(), ends.tolist(), strict=True):
        keys, values = map(tensor, blocks.read(table, end if length else 0))
        mine = slice(row, row + length)
        attended = load_reference().attention(tensor(asked)[mine], keys, values, scale)
        out[mine] = to_dtype(array(attended), blocks.dtype)
        row += length
    return like(queries, out)


def attention_native(
    queries: NDArray[np.float32],
    blocks: KVBlocks,
    block_tables: NDArray[np.int32],
    lengths: NDArray[np.int32],
    starts: NDArray[np.int32],
    *,
    scale: float,
    level: str | None = None,
    threads: int,
) -> NDArray[Any]:
    """The C++ kernel of `attention`: out (T, H, d) in the dtype of the blocks."""
    rows, heads, _ = queries.shape
    sequences, width = block_tables.shape
    spans = np.empty((sequences, 4), np.int32)  # row, rows, position, entry of the table
    spans[:, 0] = lengths.cumsum() - lengths
    spans[:, 1] = lengths
    spans[:, 2] = starts
    spans[:, 3] = np.arange(sequences) * width
    out = np.empty((rows, heads, blocks.head_dim), BITS[blocks.dtype])
    native.extension().attention(
        native.level_index(level),
        kv=blocks.data,
        kv_heads=blocks.kv_heads,
        scale=scale,
        queries=to_dtype(queries, blocks.dtype),
        spans=spans,
        block_tables=block_tables,
        out=out,
        threads=threads,
    )
    return out


def _check_heads(queries: Array, blocks: KVBlocks) -> None:
    _, heads, head_dim = queries.shape
    if head_dim != blocks.head_dim:
        raise KernelError(
            f"queries must have heads of {blocks.head_dim} channels like the blocks, "
            f"got {head_dim}."
        )
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise KernelError(
            f"heads must have an even number of channels in [2, {MAX_HEAD_DIM}], got {head_dim}."
        )
    group, left = divmod(heads, blocks.kv_heads)
    if left or not 1 <= group <= MAX_HEADS_PER_GROUP:
        raise KernelError(
            f"queries must have 1 to {MAX_HEADS_PER_GROUP} times the {blocks.kv_heads} key/value "
            f"heads of the blocks, got {heads}."
        )
