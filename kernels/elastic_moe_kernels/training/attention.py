"""x + attention(norm(x)), differentiable: one native call each way."""

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
class AttentionShape:
    """H query heads and G key/value heads of d channels; `eps` of all norms.

    interleaved: how channels pair up in the rotation, (2i, 2i + 1) or (i, i + d/2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    interleaved: bool = False


def attention_block(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    shape: AttentionShape,
    *,
    level: str | None = None,
) -> Tensor:
    """x + attention(norm(x)), causal within each sequence.

    Args:
        x: (B, T, D).
        norm: (D,) gain of the norm in front.
        q, k, v, o: (H*d, D), (G*d, D) twice, (D, H*d).
        q_norm, k_norm: (d,) gains of the norms of each head, or None.
        cos, sin: (T, d/2) of the rotation.

    Returns:
        (B, T, D).

    Raises:
        KernelError: a tensor is not float32 on the CPU, contiguous and of the shape said above.
    """
    B, T, D = x.shape
    H, G, d = shape.heads, shape.kv_heads, shape.head_dim
    why = refusal(D, d, TRAINING_MULTIPLE)
    if why is not None or H % G:
        raise KernelError(f"{why or f'{H} heads must be a multiple of {G} key/value heads'}.")
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "x": (x, (B, T, D)),
        "norm": (norm, (D,)),
        "q": (q, (H * d, D)),
        "k": (k, (G * d, D)),
        "v": (v, (G * d, D)),
        "o": (o, (D, H * d)),
        "cos": (cos, (T, d // 2)),
        "sin": (sin, (T, d // 2)),
    }
    if (q_norm is None) != (k_norm is None):
        raise KernelError("q_norm and k_norm must both be there, or neither.")
    if q_norm is not None and k_norm is not None:
        wanted |= {"q_norm": (q_norm, (d,)), "k_norm": (k_norm, (d,))}
    check(wanted)
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        x, norm, q, k, v, o, q_norm, k_norm, cos, sin, shape, native.level_index(level)
    )
    return out


# The arguments that have gradients, in the order of `forward`.
_LEARNED = ("x", "norm", "q", "k", "v", "o", "q_norm", "k_norm")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        shape: AttentionShape,
        level: int,
    ) -> Tensor:
        B, T, D = x.shape
        rows, H, G, d = B * T, shape.heads, shape.kv_heads, shape.head_dim
        saved = {
            "norm_scale": x.new_empty(rows),
            "qkv": x.new_empty(rows, (H + 2 * G) * d),
            "head_scale": x.new_empty(rows, H + G),
            "rotated": x.new_empty(rows, (H + G) * d),
            "attended": x.new_empty(rows, H * d),
            "log_sums": x.new_empty(rows, H),
        }
        out = torch.empty_like(x)
        given = {"x": x, "norm": norm, "q": q, "k": k, "v": v, "o": o, "cos": cos, "sin": sin}
        norms = {"q_norm": q_norm, "k_norm": k_norm}
        numbers = {
            "rows": rows,
            "length": T,
            "hidden": D,
            "heads": H,
            "kv_heads": G,
            "head_dim": d,
            "interleaved": shape.interleaved,
            "eps": shape.eps,
        }
        native.extension().attention_training(
            level,
            False,
            **numbers,
            **arrays(**given, **norms, **saved, out=out),
            threads=torch.get_num_threads(),
        )
        save(ctx, {**given, **norms, **saved})
        ctx.numbers, ctx.level = numbers, level
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0].contiguous()
        tensors = restore(ctx)
        grads = gradients(tensors, _LEARNED)
        native.extension().attention_training(
            ctx.level,
            True,
            **ctx.numbers,
            **arrays(**tensors, **grads, grad_out=grad),
            threads=torch.get_num_threads(),
        )
        return (*grads.values(), None, None, None, None)
