"""One thread for every test, and a folder for those of the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elastic_moe.train import session
from tests.train.tiny import library, novels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny steps are slower on many threads, and on a busy machine far slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with novels, and a library of one module instead of Python's."""
    sources = library(tmp_path)
    novels(tmp_path)
    monkeypatch.setattr(session, "library_files", lambda: sources)
    return tmp_path
