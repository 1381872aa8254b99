"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from elastic_moe_kernels import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=native.levels())
def level(request: pytest.FixtureRequest) -> str:
    """Every instruction-set level that this machine runs."""
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of packed weights, of what they multiply, and of caches."""
    return request.param


@pytest.fixture(autouse=True, scope="module")
def unfilled_memory_is_nan() -> Iterator[None]:
    """What an op forgets to write, or reads before it is written, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
