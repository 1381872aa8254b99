"""SwiGLU experts of rows that each chose their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import Array, array, like, tensor
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_array, check_range, check_shape, no_backward
from elastic_moe_kernels.ops.dispatch import Implementation, choose, load_reference
from elastic_moe_kernels.ops.linear import as_inputs
from elastic_moe_kernels.packing import PackedExperts, expert_bytes, unpack_experts

MAX_SLOTS = 2**31 - 1  # the kernel counts (row, expert) pairs in int32


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsResult:
    """What `experts` gives.

    Attributes:
        out: (T, D) float32, of the kind of x.
        weight_bytes: packed weights read: of every expert that any row names, once, as far as the
            widest of those rows goes.
        flops: 2 per multiply-add, each row at its own width.
    """

    out: Array
    weight_bytes: int
    flops: int


def experts(
    x: Array,
    topk_ids: Array,
    topk_weights: Array,
    channels: Array,
    experts: PackedExperts,
    *,
    implementation: Implementation = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> ExpertsResult:
    """Sum every row's experts: weight * down(silu(gate x) * (up x)), in ascending order of ids.

    Args:
        x: (T, D) float32, contiguous.
        topk_ids: (T, K) int32 in [-1, E), contiguous; -1 runs nothing. A row that names an expert
            twice gets it with the sum of both weights.
        topk_weights: (T, K) float32, contiguous.
        channels: (T,) int32 in [1, F]: of every expert's hidden channels, how many a row runs.
        experts: E experts of D inputs and F hidden channels.
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `native.level()`.
        threads: that take part at most; None for `default_threads`.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    if not isinstance(experts, PackedExperts):
        raise KernelError(
            f"experts must be PackedExperts, got {type(experts).__name__}. "
            f"Pack them with pack_experts."
        )
    given = x
    x = check_array("x", x, ("float32",), 2)
    topk_ids = check_array("topk_ids", topk_ids, ("int32",), 2)
    topk_weights = check_array("topk_weights", topk_weights, ("float32",), 2)
    channels = check_array("channels", channels, ("int32",), 1)
    rows = len(x)
    check_shape("x", x, (rows, experts.hidden), "one column per input of the experts")
    check_shape("topk_ids", topk_ids, (rows, topk_ids.shape[1]), "one row for each of x")
    check_shape("topk_weights", topk_weights, tuple(topk_ids.shape), "one weight per id")
    check_shape("channels", channels, (rows,), "one entry for each row of x")
    slots = rows * topk_ids.shape[1]
    if slots > MAX_SLOTS:
        raise KernelError(
            f"topk_ids must hold at most {MAX_SLOTS} ids, got {slots}. Run fewer rows at once."
        )
    check_range("topk_ids", topk_ids, -1, experts.num_experts - 1, "an expert, or -1 for none")
    check_range("channels", channels, 1, experts.channels, "the experts' hidden channels")
    count = native.check_threads(threads)
    unfit = no_backward(x, topk_weights)
    ids, widths = array(topk_ids), array(channels)
    if choose(implementation, unfit, level) == "cpu":
        out, weight_bytes, flops = experts_native(
            array(x), ids, array(topk_weights), widths, experts, level=level, threads=count
        )
        return ExpertsResult(like(given, out), weight_bytes, flops)
    inputs = map(tensor, (x, topk_ids, topk_weights, channels, *unpack_experts(experts)))
    return ExpertsResult(
        like(given, load_reference().experts(*inputs)), *_count(ids, widths, experts)
    )


def experts_native(
    x: NDArray[np.float32],
    topk_ids: NDArray[np.int32],
    topk_weights: NDArray[np.float32],
    channels: NDArray[np.int32],
    experts: PackedExperts,
    *,
    level: str | None = None,
    threads: int,
) -> tuple[NDArray[np.float32], int, int]:
    """The C++ kernel of `experts`: out (T, D) float32, weight bytes and FLOPs."""
    out = np.zeros((len(x), experts.hidden), np.float32)
    inputs = as_inputs(x, experts.dtype)
    counted = add_experts(
        out, inputs, topk_ids, topk_weights, channels, experts, level=level, threads=threads
    )
    return out, *counted


def add_experts(
    out: Array,
    inputs: Array,
    topk_ids: Array,
    topk_weights: Array,
    channels: Array,
    experts: PackedExperts,
    *,
    level: str | None = None,
    threads: int | None = None,
) -> tuple[int, int]:
    """The C++ kernel by itself: nothing is checked, converted, padded or allocated.

    Args:
        out: (T, D) float32, added to.
        inputs: (T, D) in the experts' dtype, in rows of whole vectors, zeros behind the last value.

    Returns:
        Weight bytes and FLOPs.
    """
    weight_bytes, flops = native.extension().experts(
        native.level_index(level),
        weights=experts.data,
        num_experts=experts.num_experts,
        channels=experts.channels,
        x=array(inputs),
        topk_ids=array(topk_ids),
        topk_weights=array(topk_weights),
        row_channels=array(channels),
        out=array(out),
        threads=native.check_threads(threads),
    )
    return weight_bytes, flops


def _count(
    topk_ids: NDArray[np.int32], channels: NDArray[np.int32], experts: PackedExperts
) -> tuple[int, int]:
    """Weight bytes and FLOPs of an `ExpertsResult`."""
    runs = topk_ids >= 0  # (T, K)
    weight_bytes = sum(
        expert_bytes(
            experts.hidden, int(channels[(topk_ids == expert).any(axis=1)].max()), experts.dtype
        )
        for expert in set(topk_ids.flatten().tolist()) - {-1}
    )
    flops = 6 * experts.hidden * int((runs.sum(axis=1) * channels).sum())
    return weight_bytes, flops
