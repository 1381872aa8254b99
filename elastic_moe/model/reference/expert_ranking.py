"""Channel ranking: order each expert's channels so that a width slice keeps those that count.

A checkpoint that was not trained for width has its channels in any order. Permuting the channels
of an expert (rows of gate and up, columns of down alike) changes nothing of what the whole expert
computes, but decides what the first w/G of them are.

Source: importance by mean activation magnitude, as in Minitron, arXiv:2407.14679.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model.reference.layers import round_to
from elastic_moe.model.reference.moe import Experts, MoE
from elastic_moe.model.reference.transformer import ElasticTransformer
from elastic_moe.routing import Subnet


def rank_channels(
    model: ElasticTransformer,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Tensor]:
    """The order of every expert's channels by what they contribute on a calibration text.

    A channel counts as the sum over tokens of routing weight x |hidden activation|, times the norm
    of its column of `down_proj`: what it adds to the output. An expert that no token chose is
    ordered by the norms of its weights.

    Args:
        windows: token ids of the text, each window at most the model's positions.
        progress: called with (windows done, all).

    Returns:
        layer -> (E, F) long: which channel comes first, second, ...
    """
    full = Subnet.full(model.shape)
    moe = {i: layer.mlp for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoE)}
    meters = {i: _Meter(block) for i, block in moe.items()}
    before = {i: block.run_experts for i, block in moe.items()}
    for i, block in moe.items():
        block.run_experts = meters[i]
    try:
        with torch.inference_mode():
            for done, window in enumerate(windows):
                ids = torch.tensor([window], device=model.embed_tokens.weight.device)
                model.last_state(ids, full)
                if progress is not None:
                    progress(done + 1, len(windows))
    finally:
        for i, block in moe.items():
            block.run_experts = before[i]
    return {i: meter.order() for i, meter in meters.items()}


def reorder_channels(model: ElasticTransformer, order: dict[int, Tensor]) -> None:
    """Put every expert's channels in the given order, in place. The whole network stays the same.

    Args:
        order: layer -> (E, F), as `rank_channels` returns.
    """
    for i, channels in order.items():
        block = model.layers[i].mlp
        if not isinstance(block, MoE):
            continue
        experts = block.experts
        with torch.no_grad():
            for e, kept in enumerate(channels.to(experts.gate_proj.device)):
                experts.gate_proj[e] = experts.gate_proj[e][kept]
                experts.up_proj[e] = experts.up_proj[e][kept]
                experts.down_proj[e] = experts.down_proj[e][:, kept]


class _Meter:
    """Runs a layer's experts as the layer would, and adds up what every channel contributes."""

    def __init__(self, block: MoE) -> None:
        self.block, self.run = block, block.run_experts
        experts, channels = block.experts.gate_proj.shape[:2]
        self.total = torch.zeros(experts, channels, dtype=torch.float64)

    def __call__(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        channels: Tensor,
        experts: Experts,
        input_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The outputs of `run_experts`, with the channels' contributions added up."""
        rounded = round_to(x, input_dtype)
        for expert in sorted(set(topk_ids.flatten().tolist()) - {-1}):
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)  # (n,), (n,)
            gate = rounded[rows] @ experts.gate_proj[expert].to(x.dtype).T
            up = rounded[rows] @ experts.up_proj[expert].to(x.dtype).T
            hidden = (F.silu(gate) * up).abs() * topk_weights[rows, slots].unsqueeze(1)  # (n, F)
            self.total[expert] += hidden.sum(dim=0).double().cpu()
        return self.run(x, topk_ids, topk_weights, channels, experts, input_dtype)

    def order(self) -> Tensor:
        """(E, F) channels by falling contribution, the lower number first among equals."""
        experts = self.block.experts
        rows = []
        for expert, total in enumerate(self.total):
            down = experts.down_proj[expert].double().norm(dim=0).cpu()  # (F,)
            if not total.any():
                gate = experts.gate_proj[expert].double().norm(dim=1).cpu()
                total = gate * experts.up_proj[expert].double().norm(dim=1).cpu()
            rows.append((total * down).argsort(descending=True, stable=True))
        return torch.stack(rows)
