"""Muon for the matrices of the layers, AdamW for everything else.

Source: Muon, Keller Jordan et al. 2024; the quintic Newton-Schulz coefficients are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of each matrix of a stack (n, rows <= columns, columns), by Newton-Schulz."""
    x: Tensor = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, matrix by matrix.

    Parameters may be matrices or stacks of matrices. One without a gradient in this step (a layer
    that did not run) keeps its value and its momentum.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                update = update.view(-1, *p.shape[-2:])
                tall = update.shape[-2] > update.shape[-1]
                update = orthogonalize(update.mT if tall else update)
                update = update.mT if tall else update
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)
