"""Which requests of which calls may be unfinished at once: one policy for every way to call.

A call brings one request or a list of them. It is refused when the queue is full. Otherwise it is
accepted as a whole: a list waits outside the queue, and its next request enters whenever a place is
free, whichever request left. Calls with waiting requests take turns, and none of them has more than
its share in the queue, so that a long list leaves places to other calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from elastic_moe.engine.request import Request
from elastic_moe.errors import QueueFullError


class Call:
    """The requests of one call.

    Attributes:
        requests: all of them.
        waiting: those that have not entered the queue, in their order.
        unfinished: how many are in the queue.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self.requests = tuple(requests)
        self.waiting = deque(self.requests)
        self.unfinished = 0


class Admission:
    """The places of the queue. For one thread at a time.

    Args:
        max_queue: requests that may be in the queue.
        max_per_call: requests of one call that may be in the queue.

    Attributes:
        unfinished: requests in the queue.
    """

    def __init__(self, max_queue: int, max_per_call: int) -> None:
        self._max_queue, self._max_per_call = max_queue, max_per_call
        self.unfinished = 0
        self._turns: deque[Call] = deque()  # calls with waiting requests; the next one first
        self._call_of: dict[Request, Call] = {}  # of the requests in the queue

    def accept(self, call: Call) -> list[Request]:
        """Accept a call; those of its requests that enter the queue now, at least one of any.

        Raises:
            QueueFullError: the queue is full.
        """
        if call.waiting and self.unfinished >= self._max_queue:
            raise QueueFullError(self.unfinished, self._max_queue)
        if call.waiting:
            self._turns.append(call)
        return self._admit()

    def leave(self, request: Request) -> list[Request]:
        """Free the place of a request; those that enter the queue in its stead."""
        self._call_of.pop(request).unfinished -= 1
        self.unfinished -= 1
        return self._admit()

    def withdraw(self, call: Call) -> None:
        """Drop the waiting requests of a call."""
        if call.waiting:
            call.waiting.clear()
            self._turns.remove(call)

    def withdraw_all(self) -> list[Request]:
        """Drop the waiting requests of all calls, and return them."""
        dropped = [request for call in self._turns for request in call.waiting]
        for call in list(self._turns):
            self.withdraw(call)
        return dropped

    def _admit(self) -> list[Request]:
        """Fill the free places, a request of each call in turn."""
        admitted: list[Request] = []
        passed = 0  # calls in a row that have their share already
        while self.unfinished < self._max_queue and passed < len(self._turns):
            call = self._turns.popleft()
            if call.unfinished < self._max_per_call:
                passed = 0
                request = call.waiting.popleft()
                call.unfinished += 1
                self.unfinished += 1
                self._call_of[request] = call
                admitted.append(request)
            else:
                passed += 1
            if call.waiting:
                self._turns.append(call)
        return admitted
