"""A packed matrix times many rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe_kernels import native, reference
from elastic_moe_kernels.arrays import array
from elastic_moe_kernels.constants import VECTOR_VALUES
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_shape, check_tensor, no_backward
from elastic_moe_kernels.ops.dispatch import Implementation, choose
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
        level: the instruction-set level of "cpu"; None for `native.level()`.

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
        return linear_native(x, matrix, level=level)
    return reference.linear(x, unpack_matrix(matrix))


def linear_native(x: Tensor, matrix: PackedMatrix, *, level: str | None = None) -> Tensor:
    """The C++ kernel of `linear`."""
    out = torch.empty(len(x), matrix.outputs)
    inputs = as_inputs(x, matrix.dtype)
    native.extension().linear(
        native.level_index(level),
        matrix=array(matrix.data),
        x=array(inputs),
        out=array(out),
        inputs=matrix.inputs,
        threads=torch.get_num_threads(),
    )
    return out


def as_inputs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (T, D) rounded to dtype, ties to even, each row padded with zeros to whole vectors."""
    return F.pad(x.to(dtype), (0, -x.shape[1] % VECTOR_VALUES))
