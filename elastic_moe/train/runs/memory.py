"""How this process keeps the memory that a training step frees for the next one."""

from __future__ import annotations

import ctypes

# Of glibc's mallopt. Steps free and take the same hundreds of MB; given back to the system in
# between, every page of them costs a fault and a fresh zeroing.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more


def keep_freed_memory() -> bool:
    """Let the allocator keep what is freed; returns whether this system's can be told to."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = (
        (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_TRIM_THRESHOLD, _MOST),
        (_TOP_PAD, 64 << 20),
    )
    done = [bool(mallopt(option, value)) for option, value in wanted]  # all, whatever one says
    return all(done)
