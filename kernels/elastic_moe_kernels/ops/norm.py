"""The root-mean-square norm of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe_kernels import native, reference
from elastic_moe_kernels.arrays import array
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_number, check_shape, check_tensor, no_backward
from elastic_moe_kernels.ops.dispatch import Implementation, choose, warn_if_degraded


def rms_norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    *,
    implementation: Implementation = "auto",
    level: str | None = None,
) -> Tensor:
    """Scale every row to a root mean square of 1, then channel by channel.

    Args:
        x: (T, D) float32, contiguous; float64 on the reference.
        gain: (D,) like x.
        eps: added to the mean square, finite in float32 and >= 0.
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `native.level()`.

    Returns:
        x / sqrt(mean(x^2) + eps) * gain, (T, D) like x.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    check_tensor("gain", gain, (torch.float32, torch.float64), 1)
    check_tensor("x", x, (gain.dtype,), 2, gain.device)
    check_shape("gain", gain, x.shape[1:], "one gain per column of x")
    if not gain.numel():
        raise KernelError("x must have at least one column, got 0.")
    check_number("eps", eps, low=0)
    unfit = no_backward(x, gain)
    if x.dtype != torch.float32:
        unfit = f"needs float32, got {x.dtype}. Convert with .float()."
    elif x.device.type != "cpu":
        unfit = f"needs tensors on the CPU, got {x.device}. Move them with .cpu()."
    if implementation == "auto" and not unfit:
        warn_if_degraded()
    if choose(implementation, unfit, level) == "cpu":
        return rms_norm_native(x, gain, eps, level=level)
    return reference.rms_norm(x, gain, eps)


def rms_norm_native(x: Tensor, gain: Tensor, eps: float, *, level: str | None = None) -> Tensor:
    """The C++ kernel of `rms_norm`, on float32."""
    out = torch.empty_like(x)
    native.extension().rms_norm(
        native.level_index(level),
        x=array(x),
        gain=array(gain),
        eps=eps,
        out=array(out),
        threads=torch.get_num_threads(),
    )
    return out
