"""Time limits: 408 when the body arrives too late, 504 when the answer takes too long."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_moe.server.errors import ApiError
from elastic_moe.server.observe.access_record import ACCESS_RECORD, AccessRecord


class Timeouts:
    """ASGI middleware: `receive` raises `ApiError` once a time limit has passed.

    Every endpoint waits on `receive` while it works, for the body and then for a disconnect, so
    the error reaches it wherever it is.

    Args:
        read_seconds: for the whole body to arrive.
        request_seconds: for the whole request; None for no limit.
    """

    def __init__(self, app: ASGIApp, read_seconds: float, request_seconds: float | None) -> None:
        self._app = app
        self._read_seconds, self._request_seconds = read_seconds, request_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record: AccessRecord = scope[ACCESS_RECORD]
        now = asyncio.get_running_loop().time()
        read_deadline = now + self._read_seconds
        deadline = None if self._request_seconds is None else now + self._request_seconds
        reading = True

        async def timed_receive() -> Message:
            nonlocal reading
            try:
                async with asyncio.timeout_at(read_deadline if reading else deadline):
                    message = await receive()
            except TimeoutError:
                record.timed_out = "read" if reading else "request"
                raise (self._read_timeout() if reading else self._request_timeout()) from None
            reading = reading and message.get("more_body", False)
            return message

        await self._app(scope, timed_receive, send)

    def _read_timeout(self) -> ApiError:
        return ApiError(
            408,
            f"the body did not arrive within {self._read_seconds:g} seconds.",
            code="read_timeout",
            headers={"connection": "close"},  # do not wait for the rest of the body
        )

    def _request_timeout(self) -> ApiError:
        return ApiError(
            504,
            f"the request took longer than {self._request_seconds:g} seconds, which is this "
            f"server's limit. Ask for fewer tokens or a smaller sub-network.",
            code="timeout",
        )
