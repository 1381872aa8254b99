"""One layer's experts by themselves: on given inputs and a given routing, packed or plain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from elastic_moe_kernels import cpu
from elastic_moe_kernels.packing import Arena, expert_bytes, pack_experts
from torch import Tensor

VALUES_ALIGNMENT = 32  # rows of inputs are whole vectors of any kind at any level


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

    def __init__(self, weights: LayerWeights, level: str | None = None) -> None:
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
        self._level = cpu.level_index(level)
        self.weight_bytes = self.flops = 0

    def __call__(self, inputs: LayerInputs, out: Tensor) -> Tensor:
        """Add the experts' outputs to out (T, D) float32, and return it."""
        packed, (rows, slots) = self._packed, inputs.topk_ids.shape
        x = inputs.x
        if x.stride(0) % VALUES_ALIGNMENT or x.stride(1) != 1:
            x = pad_rows(x)
        self.weight_bytes, self.flops = cpu.native().experts(
            self._level,
            packed.dtype == torch.bfloat16,
            packed.data.data_ptr(),
            packed.num_experts,
            packed.hidden,
            packed.channels,
            x.data_ptr(),
            x.stride(0),
            rows,
            slots,
            inputs.topk_ids.data_ptr(),
            inputs.topk_weights.data_ptr(),
            inputs.channels.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def pad_rows(x: Tensor) -> Tensor:
    """x (T, D) in rows that start at whole vectors, zeros between them."""
    rows, size = x.shape
    room = x.new_zeros(rows, -(-size // VALUES_ALIGNMENT) * VALUES_ALIGNMENT)
    room[:, :size] = x
    return room[:, :size]
