"""What rows of logits predict: their losses, and their distance from other rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import AnyArray, Array, array, like, tensor
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_array, check_range, check_shape, no_backward
from elastic_moe_kernels.ops.dispatch import Implementation, choose, load_reference


def divergence(
    logits: AnyArray,
    reference: Array,
    targets: Array,
    *,
    implementation: Implementation = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Loss, KL divergence from a reference and agreement with it, row by row.

    Args:
        logits: (T, V) float32, contiguous, finite.
        reference: (T, V) like logits: those of the network to compare with.
        targets: (T,) int64 in [0, V), contiguous: the tokens that came.
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `native.level()`.
        threads: that take part at most; None for `native.default_threads`.

    Returns:
        losses: (T,) float32, -log softmax(logits)[target], in nats.
        divergences: (T,) float64, KL(softmax(reference) || softmax(logits)), in nats.
        agreed: (T,) bool, whether both have the same most likely token.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    x = check_array("logits", logits, ("float32",), 2)
    other = check_array("reference", reference, ("float32",), 2)
    wanted = check_array("targets", targets, ("int64",), 1)
    rows, vocab = x.shape
    check_shape("reference", other, (rows, vocab), "that of logits")
    check_shape("targets", wanted, (rows,), "one entry for each row of logits")
    if not vocab:
        raise KernelError("logits must have at least one column, got 0.")
    check_range("targets", wanted, 0, vocab - 1, "the columns of logits")
    count = native.check_threads(threads)
    if choose(implementation, no_backward(x, other), level) == "cpu":
        found = divergence_native(array(x), array(other), array(wanted), level=level, threads=count)
    else:
        found = load_reference().divergence(tensor(x), tensor(other), tensor(wanted))
    losses, divergences, agreed = (like(logits, each) for each in found)
    return losses, divergences, agreed


def divergence_native(
    logits: NDArray[np.float32],
    reference: NDArray[np.float32],
    targets: NDArray[np.int64],
    *,
    level: str | None = None,
    threads: int,
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
    """The C++ kernel of `divergence`."""
    rows = len(logits)
    losses, divergences = np.empty(rows, np.float32), np.empty(rows, np.float64)
    agreed = np.empty(rows, np.bool_)
    native.extension().divergence(
        native.level_index(level),
        logits=logits,
        reference=reference,
        targets=targets,
        losses=losses,
        divergences=divergences,
        agreed=agreed,
        threads=threads,
    )
    return losses, divergences, agreed
