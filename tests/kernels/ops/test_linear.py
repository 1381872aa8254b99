"""C++ linear against a float64 run of the reference, at every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elastic_moe_kernels import ops, reference
from elastic_moe_kernels.packing import pack_matrix, unpack_matrix
from torch import Tensor

from tests.kernels.compare import assert_as_good, assert_same_bits

# T rows, N outputs, D inputs
LINEAR = {
    "one-token": (1, 48, 64),
    "no-token": (0, 33, 16),
    "one-output": (5, 1, 33),
    "one-input": (3, 17, 1),
    "prime-everything": (13, 127, 61),
    "odd-hidden": (4, 30, 31),
    "less-than-a-panel": (2, 7, 64),
    "one-past-a-panel": (9, 17, 64),
    "hidden-1000": (3, 1000, 1000),
    "many-pieces-of-work": (2, 4099, 96),
    "panel-larger-than-a-piece": (1, 35, 70001),
    "prefill": (131, 80, 96),
    **{f"{n}-rows": (n, 83, 40) for n in range(2, 18)},
}


def draw(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (T, D) that the dtype holds exactly, weight (N, D)."""
    generator = torch.Generator().manual_seed(rows + outputs + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype).float()
    return x, torch.randn(outputs, inputs, generator=generator).to(dtype)


def check_linear(shape: tuple[int, int, int], dtype: torch.dtype, level: str) -> None:
    x, weight = draw(*shape, dtype)
    matrix = pack_matrix(weight)
    got = ops.linear(x, matrix, implementation="cpu", level=level)
    assert got.dtype == torch.float32
    want = reference.linear(x.double(), weight.double())
    terms = x.double().abs() @ weight.double().abs().T
    scale = float(terms.max()) if len(x) else 0.0
    assert_as_good(got, reference.linear(x, weight), want, 3e-7, scale)
    assert_same_bits(unpack_matrix(matrix), weight)


@pytest.mark.parametrize("shape", LINEAR.values(), ids=LINEAR.keys())
def test_linear_agrees_with_the_float64_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, level: str
) -> None:
    check_linear(shape, dtype, level)


@pytest.mark.parametrize("shape", [(17, 35, 127), (3, 64, 200)])
def test_linear_is_exact_where_arithmetic_is(
    shape: tuple[int, int, int], dtype: torch.dtype, level: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, outputs, inputs = shape
    x = torch.randint(-200, 201, (rows, inputs), generator=generator).float()
    weight = torch.randint(-200, 201, (outputs, inputs), generator=generator).to(dtype)
    got = ops.linear(x, pack_matrix(weight), implementation="cpu", level=level)
    assert torch.equal(got.double(), x.double() @ weight.double().T)


def test_linear_rounds_its_inputs_to_even(level: str) -> None:
    one = pack_matrix(torch.ones(1, 1, dtype=torch.bfloat16))
    x = torch.tensor([[1 + 2**-8], [1 + 3 * 2**-8], [1 + 2**-8 + 2**-20], [torch.inf], [torch.nan]])
    got = ops.linear(x, one, implementation="cpu", level=level).flatten()
    assert got[:4].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, torch.inf]
    assert got[4].isnan()


def test_stacked_parts_are_one_matrix(dtype: torch.dtype, level: str) -> None:
    """Parts that end inside a panel."""
    x, weight = draw(5, 61, 24, dtype)
    parts = pack_matrix(list(weight.split([7, 33, 21])))
    whole = pack_matrix(weight)
    assert np.array_equal(parts.data, whole.data)
    options = {"implementation": "cpu", "level": level}
    assert_same_bits(ops.linear(x, parts, **options), ops.linear(x, whole, **options))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(37, 83, 40), (1, 4099, 96), (2, 35, 70001)])
def test_linear_row_depends_on_itself_alone(
    shape: tuple[int, int, int], dtype: torch.dtype, level: str
) -> None:
    x, weight = draw(*shape, dtype)
    matrix = pack_matrix(weight)
    options = {"implementation": "cpu", "level": level}
    whole = ops.linear(x, matrix, **options)
    for count in (1, 2, 3):
        shared = {**options, "threads": count}
        assert_same_bits(ops.linear(x, matrix, **shared), whole)
        assert_same_bits(ops.linear(x.flip(0), matrix, **shared), whole.flip(0))
    for n in range(1, min(len(x), 18)):
        assert_same_bits(ops.linear(x[-n:], matrix, **options), whole[-n:])
