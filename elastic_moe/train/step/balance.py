"""How tokens were shared among experts, and the bias that evens it out.

Nothing here makes a device wait: no value leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import Subnet


@dataclass(frozen=True, slots=True, eq=False)
class Loads:
    """What the routers of one forward pass gave each expert.

    Attributes:
        layers: the n layers that routed.
        counts: (n, E) int64, tokens that ran each expert.
        tokens: tokens that each layer routed.
    """

    layers: tuple[int, ...]
    counts: Tensor
    tokens: int

    def mean_experts(self) -> float:
        """Experts that really ran, per token and routing layer."""
        rows = self.tokens * len(self.layers)
        return int(self.counts.sum()) / rows if rows else 0.0


def expert_loads(trace: Trace) -> Loads:
    """The loads of a traced pass, in which every token ran the same layers."""
    if not trace.layers:
        return Loads((), torch.zeros(0, 0, dtype=torch.int64), 0)
    counts = []
    for layer in trace.layers:
        # The bin before the first expert takes what the threshold dropped.
        bins = layer.topk_ids.flatten().long() + 1
        count = bins.new_zeros(layer.router_logits.shape[1] + 1)
        counts.append(count.scatter_add_(0, bins, torch.ones_like(bins))[1:])
    layers = tuple(layer.layer for layer in trace.layers)
    return Loads(layers, torch.stack(counts), len(trace.layers[0].router_logits))


@torch.no_grad()
def move_biases(model: ElasticTransformer, loads: Loads, subnet: Subnet, rate: float) -> None:
    """Move each correction bias by `rate` towards equal loads within the pool that ran.

    Source: loss-free balancing, arXiv:2408.15664, equation 3: b_e += rate * sign(mean - load_e).
    """
    pools = expert_pools(loads, subnet)
    load = loads.counts.double()
    mean = load.sum(1, keepdim=True) / pools.sum(1, keepdim=True)
    step = (rate * (mean - load).sign()).masked_fill(~pools, 0.0)
    for row, index in enumerate(loads.layers):
        moe = model.layers[index].mlp
        if isinstance(moe, MoE) and moe.correction_bias is not None:
            moe.correction_bias.add_(step[row])


def expert_pools(loads: Loads, subnet: Subnet) -> Tensor:
    """(n, E) bool: which experts each routing layer could choose."""
    pools = torch.zeros(loads.counts.shape, dtype=torch.bool)
    for row, index in enumerate(loads.layers):
        pools[row, list(subnet.layers[index].expert_pool)] = True
    return pools.to(loads.counts.device)
