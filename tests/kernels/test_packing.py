"""Packed matrices: every value in its place, on any number of threads; finding what is infinite."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_moe_kernels import native
from elastic_moe_kernels.packing import (
    Arena,
    all_finite,
    matrix_bytes,
    pack_matrix,
    unpack_matrix,
)

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed")

SHAPES = {
    "one-value": (1, 1),
    "less-than-a-panel": (15, 8),
    "odd-inputs": (16, 7),
    "three-steps-left": (33, 14),
    "several-pieces": (1000, 300),
}
BITS = {"bfloat16": np.uint16, "float32": np.uint32}


def bits(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    limit = 1 << 8 * np.dtype(BITS[dtype]).itemsize
    numbers = np.random.default_rng(0).integers(0, limit, shape).astype(BITS[dtype])
    return numbers.view(np.float32) if dtype == "float32" else numbers


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_holds_the_next_inputs_of_sixteen_outputs(
    shape: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "default_threads", lambda: 3)
    matrix = bits(shape, dtype)
    raw = matrix.view(BITS[dtype])
    outputs, inputs = shape
    depth = 4 // raw.itemsize
    padded = np.zeros((-(-outputs // 16) * 16, -(-inputs // depth) * depth), raw.dtype)
    padded[:outputs, :inputs] = raw
    expected = padded.reshape(-1, 16, padded.shape[1] // depth, depth).swapaxes(1, 2)
    packed = pack_matrix(matrix, dtype=dtype)
    assert packed.data.tobytes() == expected.tobytes()
    assert unpack_matrix(packed).tobytes() == matrix.tobytes()


def test_rows_may_lie_apart() -> None:
    wide = bits((40, 64), "bfloat16")
    packed = pack_matrix(wide[:, 3:21], dtype="bfloat16")
    assert unpack_matrix(packed).tobytes() == np.ascontiguousarray(wide[:, 3:21]).tobytes()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("place", [0, 65535, 65536, 299_999])
def test_a_number_that_is_not_finite_is_found_wherever_it_lies(
    place: int, dtype: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "default_threads", lambda: 3)
    largest = np.full(300_000, np.finfo(np.float32).max, np.float32)
    largest.view(np.uint32)[:] &= 0xFFFF0000  # the largest of bfloat16
    largest[::2] *= -1
    broken = largest.copy()
    broken[place] = bad
    for values, expected in ((largest, True), (broken, False)):
        half = (values.view(np.uint32) >> 16).astype(np.uint16)
        numbers = values if dtype == "float32" else half
        assert all_finite(numbers, dtype) is expected
        with monkeypatch.context() as patch:
            patch.setattr(native, "missing", lambda: "no compiler")
            assert all_finite(numbers, dtype) is expected


def test_an_arena_holds_what_is_packed_after_it_was_populated() -> None:
    arena = Arena(5 << 20)
    arena.populate()
    matrix = bits((1024, 1000), "bfloat16")
    packed = pack_matrix(matrix, dtype="bfloat16", arena=arena)
    assert packed.data.size == matrix_bytes(1024, 1000, "bfloat16")
    assert unpack_matrix(packed).tobytes() == matrix.tobytes()
