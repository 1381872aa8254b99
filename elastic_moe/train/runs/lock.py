"""One training at a time in a folder.

Two would remove each other's half-written files and cut each other's log.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_moe.errors import TrainingError

LOCK = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and keep every other training out of it.

    The lock is the system's, on a file that stays: it goes with the process, however that ends.

    Raises:
        TrainingError: a training holds it, this process's included, or the file system has no
            locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _refusal(folder, error, os.pread(descriptor, 32, 0)) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(descriptor)


def _refusal(folder: Path, error: OSError, holder: bytes) -> TrainingError:
    if error.errno not in _TAKEN:
        return TrainingError(
            f"{folder / LOCK} cannot be locked: {error.strerror}. Name a folder on a file system "
            f"that has locks."
        )
    who = f", process {holder.decode().strip()}" if holder.strip().isdigit() else ""
    return TrainingError(
        f"a training is running in {folder}{who}. Wait for its end or stop it, or name another "
        f"folder."
    )
