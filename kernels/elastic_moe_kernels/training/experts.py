"""x + experts(norm(x)) of one sub-network, differentiable: one native call each way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_moe_kernels import native
from elastic_moe_kernels.constants import TRAINING_MULTIPLE
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.training.checks import (
    arrays,
    check,
    gradients,
    refusal,
    restore,
    save,
)


@dataclass(frozen=True, slots=True)
class ExpertsChoice:
    """What one sub-network may use in this layer: as `table.LayerTable`, for all rows alike.

    width: hidden channels of each expert that run. slots: columns of the routing result, top_k at
    least.
    """

    top_k: int
    min_experts: int
    threshold: float
    width: int
    pool: Tensor  # (E,) bool
    slots: int
    renormalize: bool
    epsilon: float


@dataclass(frozen=True, slots=True)
class Routed:
    """What the router of a training step did: logits (T, E), topk_ids (T, slots) int32."""

    router_logits: Tensor
    topk_ids: Tensor


def experts_block(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    correction_bias: Tensor | None,
    choice: ExpertsChoice,
    eps: float,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor, Routed]:
    """x + experts(norm(x)) of one sub-network.

    Args:
        x: (T, D).
        norm: (D,) gain of the norm in front, with `eps`.
        router: (E, D).
        gate, up, down: (E, F, D) twice, (E, D, F).
        correction_bias: (E,) added to scores for the selection, or None. It has no gradient.

    Returns:
        (T, D); the balance P sum_e f_e p_e (see `train.loss.balance_loss`), a scalar that is
        differentiable, too; what the router did.

    Raises:
        KernelError: a tensor is not float32 on the CPU, contiguous and of the shape said above,
            or the choice is out of range.
    """
    T, D = x.shape
    E, F, _ = gate.shape
    why = refusal(D, TRAINING_MULTIPLE, F)
    if why is not None:
        raise KernelError(f"{why}.")
    if not 1 <= choice.width <= F:
        raise KernelError(f"width must be in [1, {F}], got {choice.width}.")
    pool = int(choice.pool.sum())
    if not 1 <= choice.min_experts <= choice.top_k <= min(choice.slots, pool):
        raise KernelError(
            f"1 <= min_experts <= top_k <= slots and pool must hold, got {choice.min_experts}, "
            f"{choice.top_k}, {choice.slots} and {pool}."
        )
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "x": (x, (T, D)),
        "norm": (norm, (D,)),
        "router": (router, (E, D)),
        "gate": (gate, (E, F, D)),
        "up": (up, (E, F, D)),
        "down": (down, (E, D, F)),
    }
    if correction_bias is not None:
        wanted["correction_bias"] = (correction_bias, (E,))
    check(wanted)
    if choice.pool.dtype != torch.bool or choice.pool.shape != (E,):
        raise KernelError(f"pool must be ({E},) bool, got {tuple(choice.pool.shape)}.")
    out, balance, router_logits, topk_ids = _Experts.apply(  # type: ignore[no-untyped-call]
        x, norm, router, gate, up, down, correction_bias, choice, eps, native.level_index(level)
    )
    return out, balance, Routed(router_logits, topk_ids)


# The arguments that have gradients, in the order of `forward`.
_LEARNED = ("x", "norm", "router", "gate", "up", "down")


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        router: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        correction_bias: Tensor | None,
        choice: ExpertsChoice,
        eps: float,
        level: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        T, D = x.shape
        E, F, _ = gate.shape
        K = choice.slots
        padded = -(-choice.width // TRAINING_MULTIPLE) * TRAINING_MULTIPLE
        saved = {
            "norm_scale": x.new_empty(T),
            "normed": x.new_empty(T, D),
            "router_logits": x.new_empty(T, E),
            "topk_ids": x.new_empty(T, K, dtype=torch.int32),
            "topk_weights": x.new_empty(T, K),
            "place": x.new_empty(T, K, dtype=torch.int32),
            "token": x.new_empty(T * K, dtype=torch.int32),
            "weight": x.new_empty(T * K),
            "ends": x.new_empty(E, dtype=torch.int32),
            "gate_up": x.new_empty(T * K, 2 * padded),
        }
        out, balance = torch.empty_like(x), x.new_empty(())
        given = {"x": x, "norm": norm, "router": router, "gate": gate, "up": up, "down": down}
        given |= {"pool": choice.pool.contiguous()}
        numbers = {
            "rows": T,
            "hidden": D,
            "experts": E,
            "channels": F,
            "width": choice.width,
            "slots": K,
            "renormalize": choice.renormalize,
            "eps": eps,
            "epsilon": choice.epsilon,
            "top_k": choice.top_k,
            "min_experts": choice.min_experts,
            "threshold": choice.threshold,
        }
        native.extension().experts_training(
            level,
            False,
            **numbers,
            **arrays(**given, **saved, correction_bias=correction_bias, out=out, balance=balance),
            threads=torch.get_num_threads(),
        )
        save(ctx, {**given, **saved, "correction_bias": correction_bias})
        ctx.numbers, ctx.level = numbers, level
        ctx.mark_non_differentiable(saved["router_logits"], saved["topk_ids"])
        return out, balance, saved["router_logits"], saved["topk_ids"]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0].contiguous()
        tensors = restore(ctx)
        # Zeros stay where a narrower network has no channels, and where no token chose an expert.
        grads = gradients(tensors, _LEARNED, torch.zeros_like)
        native.extension().experts_training(
            ctx.level,
            True,
            **ctx.numbers,
            **arrays(**tensors, **grads, grad_out=grad),
            grad_balance=float(grad_outputs[1]),
            threads=torch.get_num_threads(),
        )
        return (*grads.values(), None, None, None, None)
