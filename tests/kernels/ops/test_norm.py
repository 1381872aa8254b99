"""C++ rms_norm against a float64 run of the reference, at every level."""

from __future__ import annotations

import pytest
import torch
from elastic_moe_kernels import ops, reference

from tests.kernels.compare import assert_as_good, assert_same_bits

# T rows, D columns
NORM = {
    "one-token": (1, 64),
    "no-token": (0, 64),
    "one-column": (7, 1),
    "prime": (13, 127),
    "less-than-a-vector": (3, 3),
    "one-past-four-vectors": (5, 65),
    "hidden-1000": (3, 1000),
    "rows-of-several-threads": (6000, 48),
}


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("shape", NORM.values(), ids=NORM.keys())
def test_norm_agrees_with_the_float64_reference(
    shape: tuple[int, int], eps: float, level: str
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = 3 * torch.randn(shape, generator=generator)
    gain = torch.randn(shape[1], generator=generator)
    got = ops.rms_norm(x, gain, eps, implementation="cpu", level=level)
    want = reference.rms_norm(x.double(), gain.double(), eps)
    assert_as_good(got, reference.rms_norm(x, gain, eps), want, little=3e-7)


@pytest.mark.usefixtures("threads")
def test_norm_of_a_row_depends_on_itself_alone(level: str) -> None:
    x, gain = torch.randn(6001, 77), torch.randn(77)  # enough rows to be shared among threads
    options = {"implementation": "cpu", "level": level}
    whole = ops.rms_norm(x, gain, 1e-5, **options)
    for count in (1, 2, 3):
        got = ops.rms_norm(x.flip(0), gain, 1e-5, **options, threads=count)
        assert_same_bits(got, whole.flip(0))
    for t in range(0, 6001, 1000):
        assert_same_bits(ops.rms_norm(x[t : t + 1], gain, 1e-5, **options), whole[t : t + 1])


def test_norm_of_zeros_is_zero_and_of_nan_is_nan(level: str) -> None:
    x = torch.zeros(3, 20)
    x[2, 19] = torch.nan
    got = ops.rms_norm(x, torch.ones(20), 1e-6, implementation="cpu", level=level)
    assert got[:2].eq(0).all()
    assert got[2].isnan().all()
