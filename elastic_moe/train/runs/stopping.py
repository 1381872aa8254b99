"""Ending a run on Ctrl-C or SIGTERM between two steps, so that nothing of a step is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from elastic_moe.train.step.loop import Trainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether someone wants the run to stop."""

    def __init__(self) -> None:
        self.wanted = False


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; the trainer stands between two steps."""


class StoppableTrainer(Trainer):
    """A trainer that begins no step once a stop is wanted.

    Raises:
        Stopped: by `train_step`.
    """

    stop: StopRequest | None = None

    def train_step(self) -> dict[str, Any]:
        if self.stop is not None and self.stop.wanted:
            raise Stopped(f"stopped after step {self.step}.")
        return super().train_step()


@contextmanager
def stopping() -> Iterator[StopRequest]:
    """Take the first SIGINT or SIGTERM as a request; a second one acts as it usually does.

    In a thread that is not the main one no signal arrives, and none is taken.
    """
    request = StopRequest()
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            signal.signal(number, handler)

    def want(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        request.wanted = True
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            before[number] = signal.signal(number, want)
    try:
        yield request
    finally:
        restore()
