"""The engine's tests run on every backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe.engine import Engine


@pytest.fixture(
    scope="session", params=[pytest.param("reference", marks=pytest.mark.needs_torch), "cpu"]
)
def tiny(tiny_folder: Path, request: pytest.FixtureRequest) -> Engine:
    """The tiny random model, in float32, on each backend in turn."""
    return Engine.from_pretrained(tiny_folder, dtype="float32", backend=request.param)
