"""Server-sent events, and requests that end when their client has gone or their time is up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elastic_moe.server.errors import as_api_error, log_failure
from elastic_moe.server.observe.account import ACCOUNT

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
LAST_WORDS_SECONDS = 5.0  # that a client may take to read why its stream ends


class ClientGone(Exception):  # noqa: N818  (nobody's fault)
    """The client has closed its connection."""


def event(body: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: %s\n\n" % json.dumps(body, separators=(",", ":")).encode()


class TextEvent:
    """An event of which only one text changes, as in nearly every event of a stream.

    Args:
        body: the rest, with `PLACE` where the text comes.
    """

    PLACE = "\0text"

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._before, _, self._after = event(body).partition(json.dumps(self.PLACE).encode())

    def __call__(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + json.dumps(text).encode() + self._after


class EventStream(Response):
    """Sends events as they come. The request ends with its connection.

    A failure before the first event is raised, so that it becomes a status; a later one is an
    event, as the status has gone out.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        self.status_code, self.background, self._events = 200, None, events
        self.init_headers({**headers, "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with suppress(ClientGone):
                first = await unless_gone(receive, anext(self._events))
                head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(head)
                try:
                    await unless_gone(receive, self._send(first, send))
                except ClientGone:
                    raise
                except Exception as error:  # noqa: BLE001  (told to the client)
                    scope[ACCOUNT].failed = True
                    await self._events.aclose()  # now: the client may not read what it is told
                    await _tell_last(error, send)

    async def _send(self, first: bytes, send: Send) -> None:
        await send(_body(first))
        async for data in self._events:
            await send(_body(data))
        await send(_body(DONE, more=False))


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _tell_last(error: Exception, send: Send) -> None:
    """End a stream with a failure, unless its client does not read."""
    told = as_api_error(error)
    if told.status == 500:
        log_failure(error)
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await send(_body(event(told.body())))
            await send(_body(DONE, more=False))


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes.

    Raises:
        ClientGone: it did.
        ApiError: its time is up; `receive` tells.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            watching.result()
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
