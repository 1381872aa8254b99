"""Single C++ kernels on tensors that `ops` has checked: dtypes, shapes, strides and every id.

They are what a step is made of (see `step`), on their own for tests, benchmarks and other engines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe_kernels import cpu
from elastic_moe_kernels.kv_blocks import KVBlocks
from elastic_moe_kernels.packing import PackedExperts, PackedMatrix

# Rows of matrix inputs are whole vectors: so many values fill one of any kind at any level.
VECTOR_VALUES = 32


def linear(x: Tensor, matrix: PackedMatrix, *, level: str | None = None) -> Tensor:
    """`reference.linear` on x (T, D) float32; out (T, N) float32."""
    out = torch.empty(len(x), matrix.outputs)
    inputs = _as_inputs(x, matrix.dtype)
    cpu.native().linear(
        cpu.level_index(level),
        matrix.dtype == torch.bfloat16,
        matrix.data.data_ptr(),
        matrix.outputs,
        matrix.inputs,
        inputs.data_ptr(),
        inputs.stride(0),
        len(x),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def rms_norm(x: Tensor, gain: Tensor, eps: float, *, level: str | None = None) -> Tensor:
    """`reference.rms_norm` on x (T, D) and gain (D,) float32."""
    out = torch.empty_like(x)
    cpu.native().rms_norm(
        cpu.level_index(level),
        x.data_ptr(),
        gain.data_ptr(),
        *x.shape,
        eps,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    channels: Tensor,
    experts: PackedExperts,
    *,
    level: str | None = None,
) -> tuple[Tensor, int, int]:
    """`reference.experts` on x (T, D) float32: out (T, D) float32, weight bytes and FLOPs."""
    out = torch.zeros(len(x), experts.hidden)
    inputs = _as_inputs(x, experts.dtype)
    counted = add_experts(out, inputs, topk_ids, topk_weights, channels, experts, level=level)
    return out, *counted


def add_experts(
    out: Tensor,
    inputs: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    channels: Tensor,
    experts: PackedExperts,
    *,
    level: str | None = None,
) -> tuple[int, int]:
    """The kernel of `experts` by itself: nothing is converted, padded or made.

    Args:
        out: (T, D) float32, added to.
        inputs: (T, D) in the experts' dtype, in rows of whole vectors, zeros behind the last value.

    Returns:
        Weight bytes and FLOPs.
    """
    weight_bytes, flops = cpu.native().experts(
        cpu.level_index(level),
        experts.dtype == torch.bfloat16,
        experts.data.data_ptr(),
        experts.num_experts,
        experts.hidden,
        experts.channels,
        inputs.data_ptr(),
        inputs.stride(0),
        *topk_ids.shape,
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        channels.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return weight_bytes, flops


def attention(
    queries: Tensor,
    blocks: KVBlocks,
    block_tables: Tensor,
    lengths: Tensor,
    starts: Tensor,
    *,
    scale: float,
    level: str | None = None,
) -> Tensor:
    """`reference.attention` of every sequence; out (T, H, d) in the dtype of the blocks."""
    rows, heads, _ = queries.shape
    sequences, width = block_tables.shape
    spans = torch.empty(sequences, 4, dtype=torch.int32)  # row, rows, position, entry of the table
    spans[:, 0] = lengths.cumsum(0) - lengths
    spans[:, 1] = lengths
    spans[:, 2] = starts
    spans[:, 3] = torch.arange(sequences) * width
    inputs = queries.to(blocks.dtype)
    out = torch.empty(rows, heads, blocks.head_dim, dtype=blocks.dtype)
    cpu.native().attention(
        cpu.level_index(level),
        blocks.dtype == torch.bfloat16,
        blocks.data.data_ptr(),
        blocks.kv_heads,
        blocks.head_dim,
        heads,
        scale,
        inputs.data_ptr(),
        spans.data_ptr(),
        sequences,
        block_tables.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _as_inputs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (T, D) rounded to dtype, ties to even, each row padded with zeros to whole vectors."""
    return F.pad(x.to(dtype), (0, -x.shape[1] % VECTOR_VALUES))
