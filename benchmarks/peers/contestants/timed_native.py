"""Stands before a packed model's native part and adds up the time inside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class TimedNative:
    """The same calls, timed.

    Attributes:
        seconds: inside steps so far.
    """

    def __init__(self, native: Any) -> None:
        self.native, self.seconds = native, 0.0

    def step(self, *arguments: Any) -> Any:
        return self._timed(self.native.step, arguments)

    def advance(self, *arguments: Any) -> Any:
        return self._timed(self.native.advance, arguments)

    def _timed(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self.seconds += time.perf_counter() - start
        return result
