"""A short soak; `make soak` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic_moe_kernels import native

from tests.engine import soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed"),
]


def test_random_requests_through_a_small_cache_leave_nothing_and_are_answered_as_alone(
    tiny_folder: Path,
) -> None:
    ended = soak.run(tiny_folder, 150, 1, "bfloat16")
    assert ended["preemptions"] > 10
    assert ended["evicted_pages"] > 10
    assert ended["answered"] > 90
    assert ended["dropped"] > 10
    assert ended["refused"] > 2
    assert ended["cursed"] > 2
