"""Writing files so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is synced and takes `path`'s place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.touch()  # with the permissions that new files get here, whatever the writer would choose
    mode = beside.stat().st_mode
    try:
        yield beside
        beside.chmod(mode)
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` to fill; on success it takes the place of `path`.

    `path` must not exist, or be an empty folder. Whatever goes wrong, nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir():
            _sync(file)
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def exchanging_folder(path: Path) -> Iterator[Path]:
    """As `replacing_folder`, but `path` may be a folder with something in it, which is lost.

    Where the system can (Linux), the two are exchanged in one step, so that every reader finds the
    old folder or the new one. Elsewhere a crash at the wrong moment leaves neither.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir():
            _sync(file)
        _sync(beside)
        if not path.exists():
            beside.replace(path)
        elif not _exchange(beside, path):
            shutil.rmtree(path)
            beside.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two files or folders take each other's name in one step; False where none is known."""
    import ctypes  # deferred: few need it

    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    done = renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange)
    return bool(done == 0)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` atomically and durably."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes to `path` atomically and durably."""
    with replacing(path) as beside:
        beside.write_bytes(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
