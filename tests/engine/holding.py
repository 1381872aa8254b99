"""Keeping an engine's thread busy, so that requests surely come together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from elastic_moe import Engine


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Nothing runs inside; what is asked for meanwhile begins together afterwards."""
    began, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        go_on.wait(60)

    core = engine._running_core()
    thread = threading.Thread(target=core.call, args=(wait,))
    thread.start()
    began.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join()
