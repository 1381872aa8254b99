"""Muon for the matrices of the layers, AdamW for everything else.

Source: Muon, Keller Jordan et al. 2024; the quintic Newton-Schulz coefficients are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from elastic_moe_kernels import training
from torch import Tensor

# Numbers that are made orthogonal together. On a CPU 1 MB, so that they stay in its cache over all
# iterations; on a GPU 512 MB, so that few calls do.
CPU_NUMBERS, GPU_NUMBERS = 1 << 18, 1 << 27


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

    Parameters may be matrices or stacks of matrices. Matrices of one shape are worked on together,
    whichever parameters they belong to: one by one, the calls would cost more than the products.

    A parameter without a gradient in this step (of a layer that did not run) keeps its value and
    its momentum. Parts of one that has a gradient (experts outside the pool or that no token chose,
    channels beyond the width) have a gradient of zero and no momentum at first, and do not move.
    Once a step has run them they have momentum, and steps that leave them out still move them along
    it: it decays by `momentum` a step, but moves them at full size as long as it lasts, since an
    update's singular values are made one whatever they were. Weight decay, where there is any,
    takes its part of them too. (AdamW likewise moves rows of routers and embeddings that a step
    left out, by a first moment that decays, at a size that does as well.)

    native: step on the C++ kernel, which takes float32 matrices with sides of whole vectors.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        native: bool = False,
    ) -> None:
        self.native = native
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            if self.native:
                self._step_native(group)
                continue
            for params in _alike(p for p in group["params"] if p.grad is not None):
                self._step_alike(params, group["lr"], group["momentum"], group["weight_decay"])

    def _step_native(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        training.muon_step(
            params,
            self._momenta(params),
            lr=group["lr"],
            beta=group["momentum"],
            weight_decay=group["weight_decay"],
        )

    def _momenta(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        return [self.state[p]["momentum"] for p in params]

    def _step_alike(
        self, params: list[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        """Step parameters whose matrices have one shape."""
        momenta = self._momenta(params)
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, momenta, momentum)
        rows, columns = params[0].shape[-2:]
        stack = torch.cat([update.reshape(-1, rows, columns) for update in updates])
        tall = rows > columns
        stack = orthogonalize(stack.mT if tall else stack)
        stack = stack.mT if tall else stack
        parts = torch.split(stack, [p.numel() // (rows * columns) for p in params])
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        scale = max(1.0, rows / columns) ** 0.5
        shaped = [part.reshape(p.shape) for part, p in zip(parts, params, strict=True)]
        torch._foreach_add_(params, shaped, alpha=-lr * scale)


def _alike(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters whose matrices have one shape, no more at a time than is good for the device."""
    kinds: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.shape[-2:], p.device), []).append(p)
    for (_, device), members in kinds.items():
        most = CPU_NUMBERS if device.type == "cpu" else GPU_NUMBERS
        batch: list[Tensor] = []
        numbers = 0
        for p in members:
            if batch and numbers + p.numel() > most:
                yield batch
                batch, numbers = [], 0
            batch.append(p)
            numbers += p.numel()
        yield batch
