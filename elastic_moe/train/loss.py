"""What a training step minimises: cross-entropy of the next token, and balance of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.transformer import Trace
from elastic_moe.routing import Subnet

ROWS = (
    512  # logits of this many tokens are alive at a time: 8 MB at 4096 words, so they stay in cache
)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(x W^T); its gradients are computed along, by chunks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = x.new_zeros(())
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, len(x), ROWS):
            rows, wanted = x[start : start + ROWS], targets[start : start + ROWS].unsqueeze(1)
            logits = rows @ weight.T  # (n, V)
            log_z = logits.logsumexp(dim=1, keepdim=True)
            total += (log_z - logits.gather(1, wanted)).sum()
            grad = logits.sub_(log_z).exp_()
            grad.scatter_add_(1, wanted, grad.new_full((1, 1), -1.0).expand_as(wanted))
            torch.mm(grad, weight, out=grad_x[start : start + ROWS])
            grad_weight.addmm_(grad.T, rows)
        ctx.save_for_backward(grad_x.div_(len(x)), grad_weight.div_(len(x)))
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_outputs[0], grad_weight * grad_outputs[0], None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: x (N, D) final states, weight (V, D) head, targets (N,) ids."""
    loss: Tensor = _HeadLoss.apply(x, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def balance_loss(trace: Trace, subnet: Subnet) -> Tensor:
    """Load balancing, summed over layers: P sum_e f_e p_e, which is 1 when experts share equally.

    f_e is the fraction of choices that fell on expert e of the pool of P, p_e its mean probability.
    Source: Switch Transformer, arXiv:2101.03961.
    """
    total = torch.zeros(())
    for layer in trace.layers:
        pool = list(subnet.layers[layer.layer].pool)
        ids = layer.topk_ids[layer.topk_ids >= 0].long()
        share = torch.bincount(ids, minlength=layer.router_logits.shape[1])[pool] / len(ids)
        probability = torch.softmax(layer.router_logits[:, pool], dim=-1).mean(0)
        total = total + len(pool) * (share * probability).sum()
    return total
