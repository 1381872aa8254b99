"""A short soak; `make soak-server` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic_moe_kernels import native

from tests.server.soak import __main__ as soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed"),
]


def test_waves_of_clients_leave_nothing_and_are_answered_as_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    found = soak.run(tiny_folder, tmp_path, 20, 2, 24, 1 << 20, "float32")
    assert found["left"] == 12
    assert found["finished"] == 28
    assert found["most_at_once"] > 10
