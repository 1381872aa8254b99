"""How pieces of text get from the engine's thread to who waits for them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from weakref import WeakValueDictionary

from elastic_moe.engine.generation import Piece
from elastic_moe.engine.outputs import Completion, Delta
from elastic_moe.errors import EngineError

Item = Piece | BaseException | None  # None: closed by the reader's own side


class Pieces:
    """Hands pieces to another thread."""

    whole = False

    def __init__(self) -> None:
        self.queue: SimpleQueue[Item] = SimpleQueue()
        self.put = self.fail = self.queue.put


class DeltaStream:
    """An iterator over a request's pieces; dropping or closing it ends the request.

    Args:
        pieces: what the engine fills. The engine has no reference to this iterator, so that it
            can be dropped.
        cancel: ends the request.
        owner: what must live as long as this.
    """

    def __init__(self, pieces: Pieces, cancel: Callable[[], None], owner: object) -> None:
        self._queue, self._cancel, self._owner = pieces.queue, cancel, owner
        self._done = False
        self._pid = os.getpid()

    def __iter__(self) -> DeltaStream:
        return self

    def __next__(self) -> Delta:
        if self._done:
            raise StopIteration
        if os.getpid() != self._pid:
            raise EngineError("a stream cannot be read after a fork. Make it where it is read.")
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            self._done = True
            raise item
        self._done = item.ending is not None
        try:
            return item.delta()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the request, if it has not ended; from any thread, one that waits for it wakes."""
        if not self._done:
            self._done = True
            self._cancel()
            self._queue.put(None)

    def __del__(self) -> None:
        self.close()


class WholeText:
    """Waits for a request's end."""

    whole = True

    def __init__(self) -> None:
        self._queue: SimpleQueue[Piece | BaseException] = SimpleQueue()
        self.put = self.fail = self._queue.put

    def wait(self) -> Completion:
        """The completion, or what went wrong."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        assert item.ending is not None
        return item.ending.completion()


class LoopMail:
    """Hands items from another thread to queues of an event loop; it wakes once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def post(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Put an item into a queue, in the loop's thread; nowhere if the loop is closed."""
        self._items.append((queue, item))
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # nobody can be told
            self._woken = False
            self._items.clear()

    def _deliver(self) -> None:
        self._woken = False  # first: what comes from now on wakes again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)


class LoopMails:
    """The mail of every event loop that somebody reads in; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mails: WeakValueDictionary[asyncio.AbstractEventLoop, LoopMail]
        self._mails = WeakValueDictionary()

    def of_running_loop(self) -> LoopMail:
        """That of the loop that runs here."""
        loop = asyncio.get_running_loop()
        with self._lock:
            mail = self._mails.get(loop)
            if mail is None:
                mail = self._mails[loop] = LoopMail(loop)
            return mail


class AsyncPieces:
    """Hands pieces to an event loop; one that is closed gets nothing more.

    Args:
        whole: whether only the last piece is wanted.
    """

    def __init__(self, mail: LoopMail, *, whole: bool = False) -> None:
        self.whole = whole
        self._mail = mail
        self._queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    def put(self, item: Piece | BaseException) -> None:
        self._mail.post(self._queue, item)

    fail = put

    async def next(self) -> Delta:
        """The next piece, or what went wrong."""
        return (await self._next()).delta()

    async def completion(self) -> Completion:
        """The whole, of the only piece."""
        ending = (await self._next()).ending
        assert ending is not None
        return ending.completion()

    async def _next(self) -> Piece:
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item
