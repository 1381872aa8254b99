"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from elastic_moe_kernels import native
from numpy.typing import NDArray

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
    empty, empty_like = np.empty, np.empty_like

    def filled(array: NDArray[Any]) -> NDArray[Any]:
        if array.dtype.kind in "fiu":
            array.fill(np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max)
        return array

    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", lambda *args, **kwargs: filled(empty(*args, **kwargs)))
        patch.setattr(np, "empty_like", lambda *args, **kwargs: filled(empty_like(*args, **kwargs)))
        yield
    torch.use_deterministic_algorithms(False)
