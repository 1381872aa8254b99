"""How close a result must be to a float64 run of the reference, and equality bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from elastic_moe_kernels.arrays import tensor
from torch import Tensor


def assert_as_good(
    got: Any,
    same_dtype: Tensor,
    want: Tensor,
    little: float = 1e-6,
    scale: float | None = None,
) -> None:
    """The largest error is at most twice that of the PyTorch op in the same dtype.

    Args:
        got, same_dtype: results of the kernel, of any kind, and of the PyTorch op.
        want: float64.
        little: rounding that is always allowed, relative to `scale`.
        scale: size of what was added up; None for the largest result, which is smaller where
            terms cancel.
    """
    got = tensor(got)
    assert want.dtype == torch.float64
    assert got.shape == same_dtype.shape == want.shape
    if not want.numel():
        return
    assert want.isfinite().all()
    error = (got.double() - want).abs()
    scale = float(want.abs().max()) if scale is None else scale
    allowed = 2 * (same_dtype.double() - want).abs().max() + little * scale
    assert (error <= allowed).all(), f"off by {error.max():.3e}, allowed is {allowed:.3e}"


def bits(tensor: Tensor) -> Tensor:
    """Integers to compare, so that NaN equals itself and -0 is not 0."""
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_same_bits(a: Any, b: Any) -> None:
    """Of arrays of any kind; uint16 is bfloat16."""
    a, b = tensor(a), tensor(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b)), "the bits differ"
