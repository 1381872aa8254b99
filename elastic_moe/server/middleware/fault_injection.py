"""Fault injection (--inject): delays, error statuses, cut and corrupted responses, on purpose."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_moe.protocol.admin.faults import Effects
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.fault_selection import (
    FORCE_TEXT,
    PREFIX,
    FaultSelector,
    Injection,
)
from elastic_moe.server.observe.access_record import ACCESS_RECORD, MAX_KEPT_BYTES, AccessRecord
from elastic_moe.server.observe.request_history import RequestHistory

INJECTION = "elastic_moe.injection"  # key of an ASGI scope: the request's `Injection`
CLOSE_CONNECTION = "elastic_moe.close_connection"  # key of an ASGI scope: Callable[[], None]
_MESSAGES = {
    400: "the request cannot be served as it is written",
    401: "an API key is needed",
    403: "this key may not do that",
    404: "there is no such model",
    409: "the request conflicts with another one",
    422: "the request cannot be understood",
    429: "too many requests",
    500: "the server had an error",
    503: "the server is overloaded",
}


class FaultInjection:
    """ASGI middleware: injects faults into requests below /v1/, and keeps these requests.

    Args:
        selector: decides which request gets which fault; None refuses all headers that ask for one.
        history: keeps every request below /v1/, unless `selector` is None.
    """

    def __init__(
        self, app: ASGIApp, selector: FaultSelector | None, history: RequestHistory
    ) -> None:
        self._app, self._selector, self._history = app, selector, history

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._selector is None or not scope["path"].startswith("/v1/"):
            _refuse_fault_headers(scope)
            await self._app(scope, receive, send)
            return
        record: AccessRecord = scope[ACCESS_RECORD]
        self._history.add(record)
        injection = self._selector.select(scope["path"], scope["headers"])
        started = asyncio.get_running_loop().time()
        body = await _read_body(receive)
        if len(body) <= MAX_KEPT_BYTES:
            record.request_body = body
        if injection is None:
            await self._app(scope, _replay(body, receive), send)
            return
        record.injected = injection.effects.model_dump(exclude_none=True)
        scope[INJECTION] = injection
        faulty_send = _FaultySend(scope, receive, send, record, injection, started)
        await asyncio.sleep(injection.seconds("latency_ms"))
        if injection.effects.error is not None:
            await _error(injection.effects).response()(scope, receive, faulty_send)
            return
        await self._app(scope, _replay(body, receive), faulty_send)
        if faulty_send.closed:  # the request ends when its connection is gone
            await _wait_for_disconnect(receive)


class _FaultySend:
    """An ASGI `send` that delays, cuts or corrupts a response.

    Attributes:
        closed: nothing more is sent.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: AccessRecord,
        injection: Injection,
        started: float,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._record, self._injection, self._started = record, injection, started
        self._head: Message | None = None
        self._stream = False
        self._events = 0
        self.closed = False

    async def __call__(self, message: Message) -> None:
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self._head = message  # held back: a fault may drop it or change its length
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._stream = content_type.startswith(b"text/event-stream")
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        await self._delay()
        if self._injection.effects.drop_after == 0:
            self._close()
        elif self._stream:
            await self._send_event(body, more)
        else:
            await self._send_body(body, more)

    async def _delay(self) -> None:
        if self._events == 0:
            due = self._started + self._injection.seconds("ttft_ms")
            await asyncio.sleep(due - asyncio.get_running_loop().time())
        else:
            await asyncio.sleep(self._injection.seconds("itl_ms"))

    async def _send_event(self, body: bytes, more: bool) -> None:
        effects = self._injection.effects
        if self._events == effects.drop_after:
            self._close()
            return
        if self._events == effects.stall_after:
            await self._stall()
            return
        if self._events == effects.malformed_after:
            self._record.damaged = True
            body = body[: len(body) // 2] + b"\n\n"
        self._events += 1
        await self._pass(body, more)

    async def _send_body(self, body: bytes, more: bool) -> None:
        effects, self._events = self._injection.effects, self._events + 1
        half = body[: len(body) // 2]
        if effects.drop_after is not None:
            self._record.damaged = True
            await self._pass(half, True)
            self._close()
        elif effects.stall_after is not None:
            self._record.damaged = True
            await self._pass(half, True)
            await self._stall()
        elif effects.malformed_after is not None and self._head is not None:
            self._record.damaged = True
            headers = [h for h in self._head["headers"] if h[0] != b"content-length"]
            self._head["headers"] = [*headers, (b"content-length", b"%d" % len(half))]
            await self._pass(half, more)
        else:
            await self._pass(body, more)

    async def _pass(self, body: bytes, more: bool) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            await self._send(head)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _stall(self) -> None:
        self.closed = self._record.damaged = True
        await _wait_for_disconnect(self._receive)

    def _close(self) -> None:
        self.closed = self._record.damaged = True
        self._scope[CLOSE_CONNECTION]()


def _refuse_fault_headers(scope: Scope) -> None:
    for header, _ in scope["headers"]:
        if header.startswith(PREFIX) or header == FORCE_TEXT:
            name = header.decode("latin-1")
            raise ApiError(
                400,
                f"{name}: faults are injected below /v1/ alone, by a server that was started "
                f"with --inject.",
                param=name,
            )


def _error(effects: Effects) -> ApiError:
    status = effects.error or 500
    message = _MESSAGES.get(status, f"status {status}")
    headers = {}
    if effects.retry_after is not None:
        headers["retry-after"] = f"{effects.retry_after:g}"
    return ApiError(status, f"{message} (injected).", code="injected", headers=headers)


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that yields a body that was read already, then what the real one yields."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
