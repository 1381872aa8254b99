"""`linear` and `rms_norm`, behind checks of their arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elastic_moe_kernels import cpu_ops, reference
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_shape, check_tensor, no_backward
from elastic_moe_kernels.ops.choice import Implementation, choose, warn_if_degraded
from elastic_moe_kernels.packing import PackedMatrix, unpack_matrix


def linear(
    x: Tensor,
    matrix: PackedMatrix,
    *,
    implementation: Implementation = "auto",
    level: str | None = None,
) -> Tensor:
    """Multiply every row by a packed matrix.

    Args:
        x: (T, D) float32, contiguous.
        matrix: N outputs, D inputs.
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `cpu.level()`.

    Returns:
        (T, N) float32.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    if not isinstance(matrix, PackedMatrix):
        raise KernelError(
            f"matrix must be a PackedMatrix, got {type(matrix).__name__}. Pack it with pack_matrix."
        )
    check_tensor("x", x, (torch.float32,), 2, matrix.data.device)
    check_shape("x", x, (x.shape[0], matrix.inputs), "one column per input of the matrix")
    unfit = no_backward(x)
    if choose(implementation, unfit, level) == "cpu":
        return cpu_ops.linear(x, matrix, level=level)
    return reference.linear(x, unpack_matrix(matrix))


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
        eps: added to the mean square, finite and >= 0.
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `cpu.level()`.

    Returns:
        x / sqrt(mean(x^2) + eps) * gain, (T, D) like x.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    check_tensor("gain", gain, (torch.float32, torch.float64), 1, gain.device)
    check_tensor("x", x, (gain.dtype,), 2, gain.device)
    check_shape("gain", gain, x.shape[1:], "one gain per column of x")
    if not gain.numel():
        raise KernelError("x must have at least one column, got 0.")
    if not (0.0 <= eps < math.inf):
        raise KernelError(f"eps must be finite and at least 0, got {eps}.")
    unfit = no_backward(x, gain)
    if x.dtype != torch.float32:
        unfit = f"needs float32, got {x.dtype}. Convert with .float()."
    elif x.device.type != "cpu":
        unfit = f"needs tensors on the CPU, got {x.device}. Move them with .cpu()."
    if implementation == "auto" and not unfit:
        warn_if_degraded()
    if choose(implementation, unfit, level) == "cpu":
        return cpu_ops.rms_norm(x, gain, eps, level=level)
    return reference.rms_norm(x, gain, eps)
