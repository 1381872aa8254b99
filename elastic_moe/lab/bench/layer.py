"""One layer's experts by themselves: on given inputs and a given routing, packed or plain."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe_kernels.constants import VECTOR_VALUES
from elastic_moe_kernels.ops.experts import add_experts
from elastic_moe_kernels.packing import Arena, expert_bytes, pack_experts
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """gate and up (E, F, D), down (E, D, F), of one dtype."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """What a layer's experts run on.

    Attributes:
        x: (T, D) in the weights' dtype.
        topk_ids: (T, K) int32, -1 where nothing runs.
        topk_weights: (T, K) float32.
        channels: (T,) int32, how many hidden channels of each expert run.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    channels: Tensor


class NativeExperts:
    """Packed experts of one layer, run by the C++ kernel.

    Attributes:
        weight_bytes, flops: that the last call touched and did.
    """

    def __init__(
        self, weights: LayerWeights, level: str | None = None, threads: int | None = None
    ) -> None:
        experts, channels, hidden = weights.gate.shape
        dtype = weights.gate.dtype
        arena = Arena(experts * expert_bytes(hidden, channels, dtype) + 64)
        self._packed = pack_experts(
            zip(weights.gate, weights.up, weights.down, strict=True),
            experts,
            hidden,
            channels,
            dtype=dtype,
            arena=arena,
        )
        self._level, self._threads = level, threads
        self.weight_bytes = self.flops = 0

    def __call__(self, inputs: LayerInputs, out: Tensor) -> Tensor:
        """Add the experts' outputs to out (T, D) float32, and return it."""
        x = inputs.x
        if x.stride(0) % VECTOR_VALUES or x.stride(1) != 1:
            x = pad_rows(x)
        self.weight_bytes, self.flops = add_experts(
            out,
            x,
            inputs.topk_ids,
            inputs.topk_weights,
            inputs.channels,
            self._packed,
            level=self._level,
            threads=self._threads,
        )
        return out


def pad_rows(x: Tensor) -> Tensor:
    """x (T, D) in rows that start at whole vectors, zeros between them."""
    rows, size = x.shape
    padded = x.new_zeros(rows, -(-size // VECTOR_VALUES) * VECTOR_VALUES)
    padded[:, :size] = x
    return padded[:, :size]
