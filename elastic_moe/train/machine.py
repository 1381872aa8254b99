"""What a training process asks of its machine: threads that sleep, memory that is kept."""

from __future__ import annotations

import ctypes
import os

# Of glibc's mallopt. Steps free and take the same hundreds of MB; given back to the system in
# between, every page of them costs a fault and a fresh zeroing.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more


def share_the_machine() -> None:
    """Have OpenMP's threads wait for microseconds, then sleep; before torch is loaded.

    As they spin by default, steps of a small model take a multiple of their time where anything
    else runs on the machine. `GOMP_SPINCOUNT` in the environment is left as it is.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def keep_freed_memory() -> bool:
    """Let the allocator keep freed memory; returns whether this system's allocator takes it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = [
        bool(mallopt(option, value))
        for option, value in (
            (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
            (_TRIM_THRESHOLD, _MOST),
            (_TOP_PAD, 64 << 20),
        )
    ]
    return all(done)
