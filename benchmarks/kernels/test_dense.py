"""Dense products, the head, and norms, beside their reference."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from elastic_moe_kernels import ops, reference
from elastic_moe_kernels.packing import PackedMatrix, pack_matrix
from torch import Tensor

from benchmarks.kernels.cases import (
    CHECKED_ROWS,
    HIDDEN,
    LAYERS,
    ROWS,
    VOCAB,
    in_turn,
    relative_error,
)
from benchmarks.kernels.conftest import Report

OUTPUTS = {"linear": 3 * HIDDEN, "head": VOCAB}
MAX_ERROR = {torch.bfloat16: 0.005, torch.float32: 1e-5}


@cache
def matrices(outputs: int) -> tuple[list[Tensor], list[PackedMatrix]]:
    """bf16 (outputs, D), plain and packed: eight, or one head, which no cache holds anyway."""
    generator = torch.Generator().manual_seed(outputs)
    plain = [
        torch.randn(outputs, HIDDEN, generator=generator).mul(0.02).bfloat16()
        for _ in range(1 if outputs == VOCAB else 8 * LAYERS)
    ]
    return plain, [pack_matrix(matrix) for matrix in plain]


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("kernel", "cold"), [("linear", True), ("linear", False), ("head", True)])
def test_product(
    measure: Report, kernel: str, cold: bool, rows: int, implementation: ops.Implementation
) -> None:
    outputs = OUTPUTS[kernel]
    plain, packed = matrices(outputs)
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    if implementation == "cpu":
        turns = in_turn(packed, cold=cold)

        def call() -> Tensor:
            return ops.linear(x, next(turns), implementation="cpu")
    else:
        # PyTorch's own product in the same dtype: the reference would convert the matrix first.
        inputs, turns = x.bfloat16(), in_turn(plain, cold=cold)

        def call() -> Tensor:
            return torch.nn.functional.linear(inputs, next(turns))

    exact = x[:CHECKED_ROWS].bfloat16().double() @ plain[0].double().T
    error = relative_error(call()[:CHECKED_ROWS], exact)
    assert error < MAX_ERROR[torch.bfloat16]
    measure(
        call,
        kernel=kernel,
        implementation=implementation,
        rows=rows,
        moved_bytes=plain[0].nbytes,
        flops=2 * rows * plain[0].numel(),
        cache="cold" if cold else "warm",
        error=error,
    )


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(measure: Report, rows: int, implementation: ops.Implementation) -> None:
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    gain = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(0)) + 0.5

    def call() -> Tensor:
        return ops.rms_norm(x, gain, 1e-5, implementation=implementation)

    exact = ops.rms_norm(x.double(), gain.double(), 1e-5, implementation="reference")
    error = relative_error(call(), exact)
    assert error < MAX_ERROR[torch.float32]
    measure(
        call,
        kernel="rms_norm",
        implementation=implementation,
        rows=rows,
        moved_bytes=2 * x.nbytes,
        flops=4 * x.numel(),
        cache="warm",
        error=error,
    )


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("rows", [1, 64])
def test_divergence(measure: Report, rows: int, implementation: ops.Implementation) -> None:
    """Of rows of logits from those of another network, as a sweep compares them."""
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, VOCAB, generator=generator)
    other = logits + 0.3 * torch.randn(rows, VOCAB, generator=generator)
    targets = torch.zeros(rows, dtype=torch.int64)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        return ops.divergence(logits, other, targets, implementation=implementation)

    exact = reference.divergence(logits.double(), other.double(), targets)[1]
    error = relative_error(call()[1], exact)
    assert error < MAX_ERROR[torch.float32]
    measure(
        call,
        kernel="divergence",
        implementation=implementation,
        rows=rows,
        moved_bytes=2 * logits.nbytes,
        flops=0,
        cache="warm",
        error=error,
    )
