"""The ops in plain PyTorch: what every fast path is tested against.

Any device, differentiable, and in whatever floating dtype the inputs have, so that tests can run
them in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe_kernels.table import LayerTable


def route(
    router_logits: Tensor,
    table: LayerTable,
    subnet_of_row: Tensor,
    *,
    renormalize: bool,
    epsilon: float = 0.0,
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the experts that run for every token, and their weights.

    Args:
        router_logits: (T, E) before the softmax, float32 (float64 in tests).
        table: k, min_experts, threshold and pool of this layer for each of S sub-networks.
        subnet_of_row: (T,) integer in [0, S), the sub-network of every token.
        renormalize: divide each row of weights by max(its sum, epsilon).
        epsilon: the architecture's guard of that division.
        correction_bias: (E,) added to the scores for the selection only (ERNIE 4.5), or None.

    Returns:
        topk_ids: (T, K) int32, K the largest k in the table; kept experts first, highest score
            first, equal scores by lower index; -1 is padding.
        topk_weights: (T, K) like router_logits; 0 where topk_ids is -1.

    Source: softmax routing of OLMoE, arXiv:2409.02060; selection bias of ERNIE 4.5; the threshold
    generalises dynamic expert skipping, arXiv:2402.14800.
    """
    rows = subnet_of_row.long()
    pool = table.pool[rows]  # (T, E)
    k = table.top_k[rows].unsqueeze(1)  # (T, 1)
    min_experts = table.min_experts[rows].unsqueeze(1)  # (T, 1)
    threshold = table.threshold[rows].unsqueeze(1).to(router_logits.dtype)  # (T, 1)

    # Experts outside the pool leave before the normalisation, as if their rows did not exist.
    scores = torch.softmax(router_logits.masked_fill(~pool, -torch.inf), dim=-1)  # (T, E)
    preference = scores if correction_bias is None else scores + correction_bias
    preference = preference.detach().masked_fill(~pool, -torch.inf)
    # A stable sort puts the lower index first among equals.
    order = preference.sort(dim=-1, descending=True, stable=True).indices  # (T, E)
    ids = order[:, : table.max_top_k]  # (T, K)
    slot = torch.arange(table.max_top_k, device=ids.device)
    selected = slot < k  # (T, K)

    if correction_bias is not None:  # from here on, order by the unbiased score
        ids = ids.masked_fill(~selected, scores.shape[1]).sort(dim=-1).values
        ids = ids.masked_fill(~selected, 0)
        unbiased = scores.detach().gather(1, ids).masked_fill(~selected, -torch.inf)
        ids = ids.gather(1, unbiased.sort(dim=-1, descending=True, stable=True).indices)

    weights = scores.gather(1, ids)  # (T, K), best first
    kept = selected & (
        (slot < min_experts) | (weights.detach() >= threshold * weights.detach()[:, :1])
    )
    weights = weights.masked_fill(~kept, 0.0)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(epsilon)
        weights = weights.masked_fill(~kept, 0.0)  # 0 / NaN in a row whose logits are not numbers
    return ids.masked_fill(~kept, -1).to(torch.int32), weights
