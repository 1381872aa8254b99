"""Inputs of the routing tests: tables of sub-networks, logits, and rows that can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from elastic_moe_kernels.arrays import tensor
from elastic_moe_kernels.reference import router_scores
from elastic_moe_kernels.table import LayerTable, build_table
from torch import Tensor

from elastic_moe.routing import LayerSubnet
from elastic_moe.routing.subnet import full_layer


@dataclass(frozen=True)
class Entry:
    """One sub-network's choice in one layer; `pool` None is all experts."""

    k: int
    min_experts: int = 1
    threshold: float = 0.0
    pool: tuple[int, ...] | None = None

    def choice(self, num_experts: int) -> LayerSubnet:
        """With the full value of every other axis."""
        sizes = {"num_experts": num_experts, "max_top_k": self.k, "width_granules": 1}
        return replace(
            full_layer(sizes),
            min_experts=self.min_experts,
            sparsity_threshold=self.threshold,
            expert_pool=tuple(range(num_experts)) if self.pool is None else self.pool,
        )


def make_table(num_experts: int, entries: list[Entry]) -> LayerTable:
    """Each entry's choice, with 8 channels of each expert."""
    choices = [[entry.choice(num_experts)] for entry in entries]
    return build_table(choices, num_experts, channels_per_granule=8).layer(0)


@dataclass(frozen=True)
class Case:
    """T rows of E logits, row t under sub-network t % S."""

    rows: int
    num_experts: int
    entries: list[Entry]
    options: dict[str, float | bool] = field(default_factory=lambda: {"renormalize": True})
    biased: bool = False
    evenly_spaced: bool = False  # scores 1 : 2 : 3 ..., so that deep cuts have a gap, too

    def build(self) -> tuple[Tensor, LayerTable, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(1000 * self.rows + self.num_experts)
        size = (self.rows, self.num_experts)
        logits = 2 * torch.randn(size, generator=generator)
        if self.evenly_spaced:
            logits = torch.log(logits.argsort(-1).float() + 1)
        bias = torch.randn(self.num_experts, generator=generator) / 5 if self.biased else None
        subnet_of_row = torch.arange(self.rows) % len(self.entries)
        return logits, make_table(self.num_experts, self.entries), subnet_of_row, bias


MIXED = [
    Entry(k=4),
    Entry(k=1, pool=(11,)),
    Entry(k=6, min_experts=2, threshold=0.5),
    Entry(k=2, threshold=1.0, pool=(1, 2, 3, 5, 8, 13, 21)),
    Entry(k=3, min_experts=3, threshold=0.9, pool=tuple(range(9))),
]

CASES = {
    "one-token": Case(1, 64, [Entry(k=8)]),
    "no-tokens": Case(0, 64, [Entry(k=8)]),
    "one-expert": Case(5, 1, [Entry(k=1)]),
    "less-than-a-vector": Case(9, 3, [Entry(k=2)]),
    "one-past-a-vector": Case(33, 17, [Entry(k=4)]),
    "prime-E": Case(37, 127, [Entry(k=6)]),
    "prime-pool": Case(37, 64, [Entry(k=6, pool=tuple(range(61)))]),
    "elastic-mini": Case(100, 16, [Entry(k=4)]),
    "olmoe-unscaled-weights": Case(100, 64, [Entry(k=8)], {"renormalize": False}),
    "every-expert-runs": Case(50, 8, [Entry(k=8)]),
    "pool-is-k": Case(50, 16, [Entry(k=4, pool=(3, 7, 8, 15))]),
    "scattered-pool": Case(50, 64, [Entry(k=5, pool=tuple(range(3, 64, 5)))]),
    "all-but-one-dropped": Case(50, 16, [Entry(k=4, threshold=1.0)]),
    "threshold-never-below-min": Case(50, 16, [Entry(k=4, min_experts=3, threshold=1.0)]),
    "some-dropped": Case(100, 64, [Entry(k=8, threshold=0.5)]),
    "some-dropped-unscaled": Case(100, 64, [Entry(k=8, threshold=0.5)], {"renormalize": False}),
    "bias": Case(100, 32, [Entry(k=6, threshold=0.3)], biased=True),
    "bias-on-scattered-pool": Case(60, 40, [Entry(k=4, pool=tuple(range(1, 40, 3)))], biased=True),
    "epsilon-above-the-sum": Case(50, 64, [Entry(k=1)], {"renormalize": True, "epsilon": 0.75}),
    "mixed-subnets": Case(203, 29, MIXED),
    "mixed-subnets-with-bias": Case(203, 29, MIXED, biased=True),
    "more-than-a-list-holds": Case(11, 300, [Entry(k=100)], evenly_spaced=True),
    "more-than-a-list-holds-with-bias": Case(
        11, 300, [Entry(k=90, threshold=0.9)], biased=True, evenly_spaced=True
    ),
    "two-threads": Case(601, 64, [Entry(k=8)]),
    "most-experts": Case(4, 4096, [Entry(k=8)]),
}


def comparable(
    logits: Tensor, table: LayerTable, subnet_of_row: Tensor, bias: Tensor | None, gap: float = 1e-6
) -> Tensor:
    """Rows (T,) bool where float32 and float64 must agree on the experts and their order.

    Every cut that a row's result depends on (the k-th best, the order among the selected, the
    threshold) has a score gap above `gap`.
    """
    rows = subnet_of_row.long()
    pool = tensor(table.pool)[rows]
    scores = router_scores(logits.double(), pool)
    preference = scores if bias is None else scores + bias.double()
    preference = preference.masked_fill(~pool, -torch.inf)
    clear = torch.zeros(len(rows), dtype=torch.bool)
    for t in range(len(rows)):
        k, threshold = int(table.top_k[rows[t]]), float(table.threshold[rows[t]])
        order = preference[t].argsort(descending=True)
        candidates = preference[t][order[: k + 1]]
        selected = scores[t][order[:k]].sort(descending=True).values
        gaps = [
            -candidates.diff(),
            -selected.diff(),
            (selected[1:] - threshold * selected[0]).abs(),
        ]
        clear[t] = all(bool((g > gap).all()) for g in gaps)
    return clear
