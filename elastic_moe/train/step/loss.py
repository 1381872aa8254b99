"""What a training step minimises: cross-entropy, distance to a teacher, imbalance of the experts.

The logits of a few rows are alive at a time, never those of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from elastic_moe_kernels import reference, training
from torch import Tensor

from elastic_moe.model.reference.transformer import Trace
from elastic_moe.routing import Subnet
from elastic_moe.train.experts.mixed import product
from elastic_moe.train.step.balance import Loads, expert_loads, expert_pools

# Rows whose logits are alive at a time. On a CPU 8 MB at 4096 words, so they stay in cache; a GPU
# wants large products.
CPU_ROWS, GPU_ROWS = 512, 8192


@dataclass(frozen=True, slots=True, eq=False)
class HeadLoss:
    """Scalars: `total` is what has a gradient.

    Attributes:
        total: (1 - share) * cross_entropy + share * distance.
        cross_entropy: mean nats per token.
        distance: mean KL(teacher || student) in nats per token, 0 without a teacher.
    """

    total: Tensor
    cross_entropy: Tensor
    distance: Tensor


class _HeadLoss(torch.autograd.Function):
    """Losses of softmax(x W^T); the gradients of their sum are computed along, by chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        share: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cross_entropy, distance = x.new_zeros(()), x.new_zeros(())
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        W = weight if dtype is None else weight.to(dtype)
        step = CPU_ROWS if x.device.type == "cpu" else GPU_ROWS
        for start in range(0, len(x), step):
            rows, wanted = x[start : start + step], targets[start : start + step].unsqueeze(1)
            grad = log_softmax_(product(rows, W.T, dtype))  # (n, V)
            cross_entropy -= grad.gather(1, wanted).sum()
            if teacher is None:
                grad.exp_()
            else:
                other = log_softmax_(product(teacher[start : start + step], W.T, dtype))
                chance = other.exp()  # (n, V)
                distance += chance.mul(other.sub_(grad)).sum()
                grad.exp_().sub_(chance, alpha=share)
            grad.scatter_add_(1, wanted, grad.new_full((1, 1), share - 1).expand_as(wanted))
            grad_x[start : start + step] = product(grad, W, dtype)
            grad_weight += product(grad.T, rows, dtype)
        N = len(x)
        cross_entropy, distance = cross_entropy / N, distance / N
        ctx.save_for_backward(grad_x.div_(N), grad_weight.div_(N))
        ctx.mark_non_differentiable(cross_entropy, distance)
        total = cross_entropy * (1 - share) + distance * share
        return total, cross_entropy, distance

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_outputs[0], grad_weight * grad_outputs[0], None, None, None, None


def log_softmax_(logits: Tensor) -> Tensor:
    """Logarithms of the softmax of each row, in the place of the logits."""
    return logits.sub_(logits.logsumexp(dim=1, keepdim=True))


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    teacher: Tensor | None = None,
    share: float = 0.0,
    dtype: torch.dtype | None = None,
    native: bool = False,
) -> HeadLoss:
    """How far the head's prediction from each state is from the target, and from a teacher's.

    Args:
        x: (N, D) final states.
        weight: (V, D) head.
        targets: (N,) ids.
        teacher: (N, D) final states whose prediction, by the same head, is to be met; it gets no
            gradient, and neither does the head by way of it.
        share: weight of KL(teacher || student), cross-entropy weighs the rest; 0 without a teacher.
        dtype: what inputs of products are rounded to; None for no rounding.
        native: on the C++ kernel, where there is no teacher.
    """
    if native and teacher is None:
        loss = training.head_loss(x, weight, targets)
        return HeadLoss(loss, loss.detach(), x.new_zeros(()))
    share = share if teacher is not None else 0.0
    parts = _HeadLoss.apply(x, weight, targets, teacher, share, dtype)  # type: ignore[no-untyped-call]
    return HeadLoss(*parts)


def balance_loss(trace: Trace, subnet: Subnet, loads: Loads | None = None) -> Tensor:
    """Load balancing, summed over layers: P sum_e f_e p_e, which is 1 when experts share equally.

    f_e is the fraction of choices that fell on expert e of the layer's pool of P, p_e its mean
    probability among the pool: a reduced pool is evened out within itself. `loads` are those of
    the trace, where they are known.
    Source: Switch Transformer, arXiv:2101.03961.
    """
    if not trace.layers:
        return torch.zeros(())
    loads = expert_loads(trace) if loads is None else loads
    logits = torch.stack([layer.router_logits for layer in trace.layers])  # (n, N, E)
    pool = expert_pools(loads, subnet)  # (n, E)
    probability = reference.router_scores(logits, pool.unsqueeze(1)).mean(1)  # (n, E)
    share = loads.counts / loads.counts.sum(1, keepdim=True)
    return (pool.sum(1) * (share * probability).sum(1)).sum()
