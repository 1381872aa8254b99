"""The ops in plain PyTorch: what every fast path is tested against.

Any device, differentiable, and in whatever floating dtype the inputs have, so that tests can run
them in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe_kernels.arrays import tensor
from elastic_moe_kernels.table import LayerTable


def router_scores(router_logits: Tensor, pool: Tensor) -> Tensor:
    """Softmax of each row over its pool, as if the other experts' rows did not exist: 0 there.

    Args:
        router_logits: (..., E).
        pool: bool that broadcasts to it.
    """
    return torch.softmax(router_logits.masked_fill(~pool, -torch.inf), dim=-1)


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
        table: the choices of S sub-networks in this layer.
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
    pool = tensor(table.pool)[rows]  # (T, E)
    k = tensor(table.top_k)[rows].unsqueeze(1)  # (T, 1)
    min_experts = tensor(table.min_experts)[rows].unsqueeze(1)  # (T, 1)
    threshold = tensor(table.threshold)[rows].unsqueeze(1).to(router_logits.dtype)  # (T, 1)

    scores = router_scores(router_logits, pool)  # (T, E)
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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply every row by a matrix.

    Args:
        x: (T, D), first rounded to the weight's dtype.
        weight: (N, D).

    Returns:
        (T, N) in x's dtype, in which sums are taken, too.
    """
    return F.linear(round_to(x, weight.dtype), weight.to(x.dtype))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, in x's dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def divergence(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every row, KL(softmax(reference) || softmax(logits)), and whether they agree.

    Args:
        logits, reference: (T, V).
        targets: (T,) integer in [0, V).

    Returns:
        (T,) in logits' dtype, in nats; (T,) float64, in nats; (T,) bool, whether the most likely
        token is the same.
    """
    own, other = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)  # (T, V)
    losses = -own.gather(1, targets.unsqueeze(1)).squeeze(1)
    divergences = (other.exp() * (other - own)).double().sum(1)
    return losses, divergences, logits.argmax(1) == reference.argmax(1)


def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    channels: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    input_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of the chosen experts' outputs, times their weights; no other expert is read.

    Args:
        x: (T, D) tokens.
        topk_ids: (T, K) integer in [-1, E), -1 where nothing runs.
        topk_weights: (T, K).
        channels: (T,) hidden channels of each expert that run for a token, in [1, F].
        gate, up: (E, F, D).
        down: (E, D, F).
        input_dtype: that matrix inputs are first rounded to; None for the weights' own.

    Returns:
        (T, D) in x's dtype, in which sums are taken, too.
    """
    out = torch.zeros_like(x)
    input_dtype = input_dtype or gate.dtype
    x = round_to(x, input_dtype)
    widths = sorted(set(channels.tolist()))
    for expert in sorted(set(topk_ids.flatten().tolist()) - {-1}):
        chosen = topk_ids == expert  # (T, K)
        for c in widths:
            at_width = chosen if len(widths) == 1 else chosen & (channels == c).unsqueeze(1)
            rows, slots = at_width.nonzero(as_tuple=True)  # (n,), (n,)
            if not len(rows):
                continue
            tokens = x[rows]  # (n, D)
            hidden = F.silu(tokens @ gate[expert, :c].to(x.dtype).T)
            hidden = hidden * (tokens @ up[expert, :c].to(x.dtype).T)  # (n, c)
            output = round_to(hidden, input_dtype) @ down[expert, :, :c].to(x.dtype).T  # (n, D)
            weight = topk_weights[rows, slots].to(x.dtype).unsqueeze(1)  # (n, 1)
            out = out.index_add(0, rows, output * weight)
    return out


def attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of one sequence; the last query stands at the last position.

    Args:
        queries: (n, H, d), first rounded to the keys' dtype; query heads H/G*g.. share head g.
        keys, values: (P, G, d) of all positions, P >= n.

    Returns:
        (n, H, d) in the queries' dtype, in which sums are taken, too.
    """
    n, positions, group = len(queries), len(keys), queries.shape[1] // keys.shape[1]
    each = [t.to(queries.dtype).repeat_interleave(group, 1) for t in (keys, values)]  # (P, H, d)
    scores = scale * torch.einsum("nhd,phd->hnp", round_to(queries, keys.dtype), each[0])
    seen = torch.ones(n, positions, dtype=torch.bool, device=scores.device).tril(positions - n)
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hnp,phd->nhd", probabilities, each[1])


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x's values rounded to `dtype`, in x's own dtype."""
    return x if dtype == x.dtype else x.to(dtype).to(x.dtype)
