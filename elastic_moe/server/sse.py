"""Server-sent events: `data: {json}`, a blank line, and `data: [DONE]` last."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elastic_moe.server.disconnect import ClientDisconnected, cancel_on_disconnect
from elastic_moe.server.errors import as_api_error, log_failure
from elastic_moe.server.observe.access_record import ACCESS_RECORD

DONE = b"data: [DONE]\n\n"
ERROR_SEND_SECONDS = 5.0  # for a slow client to read the error that ends its stream


def event(body: Mapping[str, Any]) -> bytes:
    """The bytes of one event."""
    return b"data: %s\n\n" % json.dumps(body, separators=(",", ":")).encode()


class TextEvent:
    """An event in which only one text changes, like nearly all of a stream: encodes that alone.

    Args:
        body: the event, with `PLACEHOLDER` in place of the text.
    """

    PLACEHOLDER = "\0text"

    def __init__(self, body: Mapping[str, Any]) -> None:
        placeholder = json.dumps(self.PLACEHOLDER).encode()
        self._before, _, self._after = event(body).partition(placeholder)

    def __call__(self, text: str) -> bytes:
        """The bytes of the event with this text."""
        return self._before + json.dumps(text).encode() + self._after


class EventStream(Response):
    """A response that sends events as they come, and is cancelled by a disconnect.

    A failure before the first event is raised, so that it becomes a status. A later one becomes an
    event, as the status was sent already.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        self.status_code, self.background, self._events = 200, None, events
        self.init_headers({**headers, "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with suppress(ClientDisconnected):
                first = await cancel_on_disconnect(receive, anext(self._events))
                head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(head)
                try:
                    await cancel_on_disconnect(receive, self._send_events(first, send))
                except ClientDisconnected:
                    raise
                except Exception as error:  # noqa: BLE001  (sent to the client)
                    scope[ACCESS_RECORD].failed = True
                    await self._events.aclose()  # now: the client may not read what comes next
                    await _send_error(error, send)

    async def _send_events(self, first: bytes, send: Send) -> None:
        await send(_body(first))
        async for data in self._events:
            await send(_body(data))
        await send(_body(DONE, more=False))


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _send_error(error: Exception, send: Send) -> None:
    """End a stream with an error event, unless the client does not read."""
    answer = as_api_error(error)
    if answer.status == 500:
        log_failure(error)
    with suppress(TimeoutError):
        async with asyncio.timeout(ERROR_SEND_SECONDS):
            await send(_body(event(answer.body())))
            await send(_body(DONE, more=False))
