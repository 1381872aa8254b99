"""Inputs of the tests of experts: shapes named by their reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from elastic_moe_kernels.packing import PackedExperts, pack_experts
from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ExpertsCase:
    """T rows, each with k of E experts of D inputs and F channels.

    Attributes:
        widths: channels of row t are widths[t % len(widths)]; () is F for all.
        dropped: of a row's k choices, how many are -1 (at random places).
        only: the experts that rows choose from, () for all; with fewer than k, a row repeats one.
    """

    rows: int
    experts: int
    hidden: int
    channels: int
    k: int
    widths: tuple[int, ...] = ()
    dropped: int = 0
    only: tuple[int, ...] = ()

    def weights(self, dtype: torch.dtype) -> Weights:
        """gate and up (E, F, D), down (E, D, F)."""
        return _weights(self.experts, self.hidden, self.channels, dtype)

    def packed(self, dtype: torch.dtype) -> PackedExperts:
        return _packed(self.experts, self.hidden, self.channels, dtype)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (T, D), topk_ids (T, k), topk_weights (T, k), channels (T,)."""
        generator = torch.Generator().manual_seed(7 * self.rows + self.experts)
        x = torch.randn(self.rows, self.hidden, generator=generator)
        only = torch.tensor(self.only or range(self.experts))
        order = torch.rand(self.rows, max(len(only), self.k), generator=generator).argsort(-1)
        ids = only[order[:, : self.k] % len(only)].to(torch.int32)
        drop = torch.rand(self.rows, self.k, generator=generator).argsort(-1) < self.dropped
        weights = torch.rand(self.rows, self.k, generator=generator) + 0.1
        widths = torch.tensor(self.widths or (self.channels,), dtype=torch.int32)
        channels = widths[torch.arange(self.rows) % len(widths)]
        return x, ids.masked_fill(drop, -1), weights.masked_fill(drop, 0.0), channels


@cache
def _weights(experts: int, hidden: int, channels: int, dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(experts + hidden + channels)

    def draw(outputs: int, inputs: int) -> Tensor:
        weight = torch.randn(experts, outputs, inputs, generator=generator)
        return (weight / inputs**0.5).to(dtype)

    return draw(channels, hidden), draw(channels, hidden), draw(hidden, channels)


@cache
def _packed(experts: int, hidden: int, channels: int, dtype: torch.dtype) -> PackedExperts:
    return pack_stacked(*_weights(experts, hidden, channels, dtype), dtype)


def pack_stacked(gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> PackedExperts:
    """Stacked weights as packed ones."""
    experts, channels, hidden = gate.shape
    return pack_experts(zip(gate, up, down, strict=True), experts, hidden, channels, dtype=dtype)


def union_bytes(
    ids: Tensor, channels: Tensor, hidden: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Weight bytes, FLOPs and experts, expert by expert from the layout in csrc/core/values.h."""
    depth = 4 // dtype.itemsize
    widest: dict[int, int] = {}
    flops = 0
    for row, width in zip(ids.tolist(), channels.tolist(), strict=True):
        for expert in row:
            if expert >= 0:
                widest[expert] = max(widest.get(expert, 0), width)
                flops += 3 * 2 * width * hidden
    total = 0
    for width in widest.values():
        gate_up = 2 * _ceil(width, 16) * _ceil(hidden, depth)
        down = _ceil(hidden, 16) * _ceil(width, depth)
        total += 64 * (gate_up + down)
    return total, flops, len(widest)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


PLAIN = ExpertsCase(rows=19, experts=7, hidden=40, channels=48, k=2)
CASES = {
    "plain": PLAIN,
    "one-token": replace(PLAIN, rows=1),
    "no-token": replace(PLAIN, rows=0),
    "no-choice": replace(PLAIN, k=0),
    "one-expert": replace(PLAIN, experts=1, k=1),
    "every-expert-runs": replace(PLAIN, k=7),
    "all-but-one-dropped": replace(PLAIN, k=5, dropped=4),
    "all-dropped": replace(PLAIN, k=3, dropped=3),
    "one-expert-has-all-rows": replace(PLAIN, rows=37, k=1, only=(5,)),
    "row-names-an-expert-twice": replace(PLAIN, k=4, only=(2, 6)),
    "prime-E": replace(PLAIN, rows=61, experts=127, k=3),
    "prime-everything": ExpertsCase(23, 13, 37, 41, 3, widths=(41, 1, 19, 2, 37)),
    "odd-hidden": replace(PLAIN, hidden=31, widths=(48, 24)),
    "odd-channels": replace(PLAIN, channels=17),
    "one-hidden": replace(PLAIN, hidden=1),
    "one-channel": replace(PLAIN, channels=1),
    "one-channel-of-many": replace(PLAIN, widths=(1,)),
    "less-than-a-panel": replace(PLAIN, hidden=7, channels=5, widths=(5, 4, 1)),
    "one-past-a-panel": replace(PLAIN, hidden=17, channels=33, widths=(33, 32, 17)),
    "narrow-rows-only": replace(PLAIN, widths=(16, 9)),
    "mixed-widths-in-one-tile": replace(
        PLAIN, rows=16, channels=64, k=1, only=(3,), widths=(1, 64, 33, 15, 16, 48, 17, 32)
    ),
    "mixed-widths-ascending": replace(PLAIN, rows=64, channels=64, widths=tuple(range(1, 65))),
    "many-panels-of-outputs": ExpertsCase(9, 3, 272, 32, 2, widths=(32, 8)),
    "channels-beyond-a-piece-of-work": ExpertsCase(3, 2, 600, 240, 1, widths=(240, 30)),
    "elastic-mini": ExpertsCase(40, 16, 192, 64, 4, widths=(64, 48, 64, 8)),
    "awkward-granules": ExpertsCase(11, 7, 1000, 520, 5, widths=tuple(range(520, 0, -65))),
    **{f"{n}-rows": replace(PLAIN, rows=n, experts=2, k=1, only=(1,)) for n in range(2, 10)},
    **{
        f"{n}-rows-of-mixed-width": replace(
            PLAIN, rows=n, experts=2, k=1, only=(1,), widths=(30, 48, 3)
        )
        for n in range(2, 10)
    },
}
