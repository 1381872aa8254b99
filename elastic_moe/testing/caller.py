"""Calls a client that may hang, in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Returned:
    """What a call returned."""

    value: object

    def __str__(self) -> str:
        text = repr(self.value)
        return f"returned {text if len(text) <= 80 else f'{text[:77]}...'}"


@dataclass(frozen=True, slots=True)
class Raised:
    """What a call raised."""

    error: BaseException

    def __str__(self) -> str:
        text = " ".join(str(self.error).split())
        message = type(self.error).__name__ + (f": {text}" if text else "")
        return f"raised {message if len(message) <= 120 else f'{message[:117]}...'}"


End = Returned | Raised


class Caller:
    """Calls a function, sync or async, in a thread of its own.

    All its calls share one event loop, so that an async client may be made once. A thread that
    hangs ends with this process.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[End] = queue.SimpleQueue()
        self.busy = False
        self._thread = threading.Thread(target=self._run, name="elastic-moe caller", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Start a call."""
        self.busy = True
        self._wanted.put(True)

    def end(self, seconds: float) -> End | None:
        """The end of the call; None if it still runs after so many seconds."""
        try:
            end = self._ends.get(timeout=seconds)
        except queue.Empty:
            return None
        self.busy = False
        return end

    def close(self) -> None:
        """Accept no more calls, and close the event loop unless a call hangs."""
        self._wanted.put(False)
        if not self.busy:
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            while self._wanted.get():
                try:
                    value = self._call()
                    if inspect.isawaitable(value):
                        value = runner.run(_wait(value))
                    end: End = Returned(value)
                except BaseException as error:  # noqa: BLE001  (the caller judges it)
                    end = Raised(error)
                self._ends.put(end)


async def _wait(value: Awaitable[Any]) -> Any:
    return await value
