"""A packed matrix times many rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import BITS, AnyArray, DType, array, empty, like, tensor, to_dtype
from elastic_moe_kernels.constants import VECTOR_VALUES
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_array, check_shape, no_backward
from elastic_moe_kernels.ops.dispatch import Implementation, choose, load_reference
from elastic_moe_kernels.packing import PackedMatrix, unpack_matrix


def linear(
    x: AnyArray,
    matrix: PackedMatrix,
    *,
    implementation: Implementation = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> AnyArray:
    """Multiply every row by a packed matrix.

    Args:
        x: (T, D) float32, contiguous.
        matrix: N outputs, D inputs.
        implementation: "auto", "reference" or "cpu".
        level: the instruction-set level of "cpu"; None for `native.level()`.
        threads: that take part at most; None for `default_threads`.

    Returns:
        (T, N) float32.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    if not isinstance(matrix, PackedMatrix):
        raise KernelError(
            f"matrix must be a PackedMatrix, got {type(matrix).__name__}. Pack it with pack_matrix."
        )
    rows = check_array("x", x, ("float32",), 2)
    check_shape("x", rows, (len(rows), matrix.inputs), "one column per input of the matrix")
    count = native.check_threads(threads)
    if choose(implementation, no_backward(rows), level) == "cpu":
        return like(x, linear_native(array(rows), matrix, level=level, threads=count))
    return like(x, load_reference().linear(tensor(rows), tensor(unpack_matrix(matrix))))


def linear_native(
    x: NDArray[np.float32], matrix: PackedMatrix, *, level: str | None = None, threads: int
) -> NDArray[np.float32]:
    """The C++ kernel of `linear`."""
    out = np.empty((len(x), matrix.outputs), np.float32)
    native.extension().linear(
        native.level_index(level),
        matrix=matrix.data,
        x=as_inputs(x, matrix.dtype),
        out=out,
        inputs=matrix.inputs,
        threads=threads,
    )
    return out


def as_inputs(x: NDArray[np.float32], dtype: DType) -> NDArray[Any]:
    """x (T, D) rounded to dtype, ties to even, each row padded with zeros to whole vectors."""
    rows, size = x.shape
    padded = size + -size % VECTOR_VALUES
    if padded == size:
        return np.ascontiguousarray(to_dtype(x, dtype))
    inputs = empty((rows, padded), BITS[dtype])
    inputs[:, :size] = to_dtype(x, dtype)
    inputs[:, size:] = 0
    return inputs
