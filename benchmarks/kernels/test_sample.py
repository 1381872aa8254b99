"""Drawing tokens beside the numpy reference.

The limit is the time to read the logits at the streaming bandwidth; a row that was just computed is
in a cache. `bar_seconds`, on one core of the avx512 level, is for a single row alone.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
from elastic_moe_kernels import ops
from elastic_moe_kernels.ops.sample_reference import new_rows

from benchmarks.kernels.conftest import Report

BARS = {4096: 0.02e-3, 50_304: 0.10e-3, 151_936: 0.30e-3}
SPREAD = {"flat": 0.1, "peaked": 3.0}  # standard deviation of the logits
METHODS: dict[str, dict[str, Any]] = {
    "all": {},
    "top-p": {"top_p": 0.95},
    "top-k": {"top_k": 20, "top_p": 0.95},
}


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("vocab", BARS)
def test_sample(
    measure: Report,
    vocab: int,
    rows: int,
    kind: str,
    method: str,
    implementation: ops.Implementation,
) -> None:
    rng = np.random.default_rng(vocab)
    logits = (SPREAD[kind] * rng.standard_normal((rows, vocab))).astype(np.float32)
    values = new_rows(rows)
    for name, value in METHODS[method].items():
        values[name] = value
    positions = count()

    def call() -> Any:
        values["position"] = next(positions)  # another draw each time
        return ops.sample(logits, values, implementation=implementation)

    measure(
        call,
        kernel="sample",
        implementation=implementation,
        rows=rows,
        moved_bytes=logits.nbytes,
        flops=25 * logits.size,  # of the exponential
        cache="warm",
        vocab=vocab,
        logits=kind,
        method=method,
        bar_seconds=BARS[vocab] if rows == 1 and method == "top-p" else None,
    )
