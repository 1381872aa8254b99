"""A pytest plugin, for `make test-sanitize`: the kernels come from a build with sanitizers.

Python, torch and their memory are not instrumented, but every tensor and array that a kernel gets
is allocated through AddressSanitizer, which must be loaded first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

BUILD = Path(__file__).resolve().parents[2] / "build" / "sanitize"
PATTERNS = {
    "elastic_moe_kernels._native": "_native*.so",
    "elastic_moe_kernels._build_info": "_build_info.py",
}


class _Sanitized:
    """Finds the compiled modules in BUILD."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in PATTERNS:
            return None
        (file,) = BUILD.glob(PATTERNS[name])
        return spec_from_file_location(name, file)


sys.meta_path.insert(0, _Sanitized())


def pytest_sessionstart() -> None:
    """Make sure of what is tested, and give every packed tensor memory of its own."""
    from elastic_moe_kernels import native, packing

    found = Path(str(native.extension().__file__))
    if found.parent != BUILD or "libasan" not in Path("/proc/self/maps").read_text():
        raise pytest.UsageError(f"{found} is no build with sanitizers. Use make test-sanitize.")

    def take(_: packing.Arena, size_bytes: int) -> NDArray[np.uint8]:
        return np.empty(size_bytes, np.uint8)

    packing.Arena.take = take  # type: ignore[method-assign]
