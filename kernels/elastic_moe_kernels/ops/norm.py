"""The root-mean-square norm of every row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import AnyArray, array, device_of, dtype_name, like, tensor
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_array, check_number, check_shape, no_backward
from elastic_moe_kernels.ops.dispatch import (
    Implementation,
    choose,
    load_reference,
    warn_if_degraded,
)


def rms_norm(
    x: AnyArray,
    gain: AnyArray,
    eps: float,
    *,
    implementation: Implementation = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> AnyArray:
    """Scale every row to a root mean square of 1, then channel by channel.

    Args:
        x: (T, D) float32, contiguous; float64 on the reference.
        gain: (D,) like x.
        eps: added to the mean square, finite in float32 and >= 0.
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `native.level()`.
        threads: that take part at most; None for `default_threads`.

    Returns:
        x / sqrt(mean(x^2) + eps) * gain, (T, D) like x.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    where = device_of(gain)
    gains = check_array("gain", gain, ("float32", "float64"), 1, where)
    rows = check_array("x", x, (dtype_name(gains.dtype),), 2, where)
    check_shape("gain", gains, rows.shape[1:], "one gain per column of x")
    if not len(gains):
        raise KernelError("x must have at least one column, got 0.")
    check_number("eps", eps, low=0)
    count = native.check_threads(threads)
    unfit = no_backward(rows, gains)
    if dtype_name(rows.dtype) != "float32":
        unfit = f"needs float32, got {dtype_name(rows.dtype)}. Convert it."
    elif where != "cpu":
        unfit = f"needs arrays on the CPU, got {where}. Move them."
    if implementation == "auto" and not unfit:
        warn_if_degraded()
    if choose(implementation, unfit, level) == "cpu":
        out = rms_norm_native(array(rows), array(gains), eps, level=level, threads=count)
        return like(x, out)
    return like(x, load_reference().rms_norm(tensor(rows), tensor(gains), eps))


def rms_norm_native(
    x: NDArray[np.float32],
    gain: NDArray[np.float32],
    eps: float,
    *,
    level: str | None = None,
    threads: int,
) -> NDArray[np.float32]:
    """The C++ kernel of `rms_norm`, on float32."""
    out = np.empty_like(x)
    native.extension().rms_norm(
        native.level_index(level), x=x, gain=gain, eps=eps, out=out, threads=threads
    )
    return out
