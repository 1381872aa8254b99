"""Ending a run on Ctrl-C or SIGTERM between two steps, so that nothing of a step is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Whether the run should end after the step that is running."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Set the flag on the first SIGINT or SIGTERM; a second one acts as it usually does.

    In a thread that is not the main one no signal arrives, and no handler is set.
    """
    flag = StopFlag()
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        flag.requested = True
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            before[number] = signal.signal(number, request)
    try:
        yield flag
    finally:
        restore()
