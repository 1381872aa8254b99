"""How pieces of text get from the engine's thread to who waits for them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from weakref import WeakValueDictionary

from elastic_moe.engine.generation.generation import Piece
from elastic_moe.engine.outputs import Completion, Delta
from elastic_moe.errors import EngineError

Item = Piece | BaseException | None  # None: closed by the reader's own side


class Pieces:
    """Hands pieces to another thread."""

    whole = False

    def __init__(self) -> None:
        self.queue: SimpleQueue[Item] = SimpleQueue()
        self.put = self.fail = self.queue.put

    def flush(self) -> None:
        """The reader has it already."""


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

    def flush(self) -> None:
        """The reader has it already."""

    def wait(self) -> Completion:
        """The completion, or what went wrong."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        assert item.ending is not None
        return item.ending.completion()


class LoopMail:
    """Hands items from another thread to readers in an event loop; it wakes once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[AsyncPieces, Piece | BaseException]] = deque()
        self._woken = False

    def post(self, reader: AsyncPieces, item: Piece | BaseException) -> None:
        """Have a reader get an item once the loop is woken."""
        self._items.append((reader, item))

    def wake(self) -> None:
        """Have the loop hand out what was posted; nobody gets it if the loop is closed."""
        if self._woken or not self._items:
            return
        self._woken = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # nobody can be told
            self._woken = False
            self._items.clear()

    def _deliver(self) -> None:
        self._woken = False  # first: what comes from now on wakes again
        while self._items:
            reader, item = self._items.popleft()
            reader.take(item)


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
    """Hands pieces to an event loop, where one at a time may wait for the next.

    Args:
        whole: whether only the last piece is wanted.
    """

    def __init__(self, mail: LoopMail, *, whole: bool = False) -> None:
        self.whole = whole
        self._mail = mail
        # Less than an asyncio.Queue, which costs as much as all else on the way of a piece.
        self._items: deque[Piece | BaseException] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: Piece | BaseException) -> None:
        self._mail.post(self, item)

    def flush(self) -> None:
        self._mail.wake()

    def fail(self, error: BaseException) -> None:
        self._mail.post(self, error)
        self._mail.wake()

    def take(self, item: Piece | BaseException) -> None:
        """Wake the reader. In the loop's thread."""
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def next(self) -> Delta:
        """The next piece, or what went wrong."""
        return (await self._next()).delta()

    async def completion(self) -> Completion:
        """The whole, of the only piece."""
        ending = (await self._next()).ending
        assert ending is not None
        return ending.completion()

    async def _next(self) -> Piece:
        if not self._items:
            self._waiting = self._mail.loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        return item
