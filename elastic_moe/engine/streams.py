"""Outputs on their way from the engine's thread to the threads and event loops that read them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from weakref import WeakValueDictionary

from elastic_moe.engine.outputs import Delta
from elastic_moe.engine.request import SequenceOutput
from elastic_moe.errors import EngineError


class BlockingOutputs:
    """The outputs of a call that a thread waits for.

    Args:
        final_only: whether only the last output of each request is wanted.

    Attributes:
        queue: None in it means that the reader's own side closed it.
    """

    def __init__(self, *, final_only: bool = False) -> None:
        self.final_only = final_only
        self.queue: SimpleQueue[SequenceOutput | BaseException | None] = SimpleQueue()
        self.put = self.fail = self.queue.put

    def flush(self) -> None:
        """Nothing to do: the reader is awake already."""

    def wait(self) -> None:
        """Wait for the next output.

        Raises:
            BaseException: a request of the call failed.
        """
        item = self.queue.get()
        if isinstance(item, BaseException):
            raise item


class DeltaStream:
    """An iterator over the pieces of a call; dropping or closing it cancels the call.

    Args:
        outputs: what the engine fills. The engine has no reference to this iterator, so that it
            can be dropped.
        num_requests: of the call.
        cancel: cancels the call.
        owner: what must live as long as this.
    """

    def __init__(
        self,
        outputs: BlockingOutputs,
        num_requests: int,
        cancel: Callable[[], None],
        owner: object,
    ) -> None:
        self._outputs, self._unfinished = outputs, num_requests
        self._cancel, self._owner = cancel, owner
        self._closed = not num_requests
        self._pid = os.getpid()

    def __iter__(self) -> DeltaStream:
        return self

    def __next__(self) -> Delta:
        if self._closed:
            raise StopIteration
        if os.getpid() != self._pid:
            raise EngineError("a stream cannot be read after a fork. Make it where it is read.")
        item = self._outputs.queue.get()
        if item is None:
            raise StopIteration
        try:
            if isinstance(item, BaseException):
                raise item
            if item.request_finished:
                self._unfinished -= 1
                self._closed = not self._unfinished
            return item.delta()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel the call, unless it has ended; from any thread: one that waits for it wakes."""
        if not self._closed:
            self._closed = True
            self._cancel()
            self._outputs.queue.put(None)

    def __del__(self) -> None:
        self.close()


class LoopNotifier:
    """Hands items from another thread to readers in an event loop, waking it once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[AsyncOutputs, SequenceOutput | BaseException]] = deque()
        self._woken = False

    def post(self, reader: AsyncOutputs, item: SequenceOutput | BaseException) -> None:
        """Add an item, which its reader gets once the loop is woken."""
        self._items.append((reader, item))

    def wake(self) -> None:
        """Have the loop deliver what was posted; it is dropped if the loop is closed."""
        if self._woken or not self._items:
            return
        self._woken = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # closed: nobody reads
            self._woken = False
            self._items.clear()

    def _deliver(self) -> None:
        self._woken = False  # first: what comes from now on wakes again
        while self._items:
            reader, item = self._items.popleft()
            reader.take(item)


class LoopNotifiers:
    """The notifier of every event loop with readers; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notifiers: WeakValueDictionary[asyncio.AbstractEventLoop, LoopNotifier]
        self._notifiers = WeakValueDictionary()

    def of_running_loop(self) -> LoopNotifier:
        """That of the loop that runs here."""
        loop = asyncio.get_running_loop()
        with self._lock:
            notifier = self._notifiers.get(loop)
            if notifier is None:
                notifier = self._notifiers[loop] = LoopNotifier(loop)
            return notifier


class AsyncOutputs:
    """The outputs of a call that a task in an event loop waits for; one task at a time.

    Args:
        final_only: whether only the last output of each request is wanted.
    """

    def __init__(self, notifier: LoopNotifier, *, final_only: bool = False) -> None:
        self.final_only = final_only
        self._notifier = notifier
        # Less than an asyncio.Queue, which costs as much as all else on the way of an output.
        self._items: deque[SequenceOutput | BaseException] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: SequenceOutput | BaseException) -> None:
        self._notifier.post(self, item)

    def flush(self) -> None:
        self._notifier.wake()

    def fail(self, error: BaseException) -> None:
        self._notifier.post(self, error)
        self._notifier.wake()

    def take(self, item: SequenceOutput | BaseException) -> None:
        """Wake the reader. In the loop's thread."""
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> SequenceOutput:
        """Wait for the next output.

        Raises:
            BaseException: a request of the call failed.
        """
        if not self._items:
            self._waiting = self._notifier.loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        return item
