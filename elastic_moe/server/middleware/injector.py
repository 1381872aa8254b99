"""Faults on purpose: what stands between the gate and the endpoints, with `--inject`."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_moe.protocol.faults import Effects
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.faults import FORCE_TEXT, PREFIX, FaultBook, Injection
from elastic_moe.server.middleware.gate import REQUEST_ID
from elastic_moe.server.observe.record import MAX_BYTES, Entry, RequestLog

INJECTION = "elastic_moe.injection"  # of a scope: what happens to the request
CLOSE = "elastic_moe.close"  # of a scope: closes its connection
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


class Injector:
    """ASGI middleware: does to requests below /v1/ what headers or the plan say; records them.

    Args:
        faults: the plan; None refuses every header that asks for a fault.
    """

    def __init__(self, app: ASGIApp, faults: FaultBook | None, log: RequestLog) -> None:
        self._app, self._faults, self._log = app, faults, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        here = scope["type"] == "http" and scope["path"].startswith("/v1/")
        if scope["type"] == "http" and (self._faults is None or not here):
            self._refuse(scope)
        if self._faults is None or not here:
            await self._app(scope, receive, send)
            return
        entry = self._log.begin(scope.get(REQUEST_ID, ""), scope["method"], scope["path"])
        try:
            injection = self._faults.meet(scope["path"], scope["headers"])
            await self._serve(scope, receive, send, entry, injection)
        except asyncio.CancelledError:
            self._log.end(entry, "gone")
            raise
        except Exception as error:  # the gate answers
            entry.status = getattr(error, "status", 500)
            self._log.end(entry, "error")
            raise
        self._log.end(entry, "truncated" if entry.spoilt else "gone")

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, entry: Entry, injection: Injection | None
    ) -> None:
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        body = await _read(receive)
        entry.body = body if len(body) <= MAX_BYTES else b""
        sender = _Sender(scope, receive, send, entry, self._log, injection, arrived)
        if injection is not None:
            entry.injected = injection.effects.model_dump(exclude_none=True)
            scope[INJECTION] = injection
            await asyncio.sleep(injection.seconds("latency_ms"))
            if injection.effects.error is not None:
                await _error(injection.effects).response()(scope, receive, sender)
                return
        await self._app(scope, _replay(body, receive), sender)
        if sender.closed:  # the connection must be gone before the answer counts as given up
            await _until_gone(receive)

    def _refuse(self, scope: Scope) -> None:
        for header, _ in scope["headers"]:
            if header.startswith(PREFIX) or header == FORCE_TEXT:
                told = header.decode("latin-1")
                raise ApiError(
                    400,
                    f"{told}: faults are injected below /v1/ alone, by a server that was started "
                    f"with --inject.",
                    param=told,
                )


class _Sender:
    """Passes an answer on, late, cut or spoilt as the effects say; notes what went out."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        entry: Entry,
        log: RequestLog,
        injection: Injection | None,
        arrived: float,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._entry, self._log = entry, log
        self._injection, self._arrived = injection, arrived
        self._effects = Effects() if injection is None else injection.effects
        self._head: Message | None = None
        self._stream = False
        self._events = 0
        self.closed = False

    async def __call__(self, message: Message) -> None:
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self._head = message  # held back until it is known what becomes of the body
            self._entry.status = message["status"]
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._stream = kind.startswith(b"text/event-stream")
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        await self._wait()
        if self._effects.drop_after == 0:
            self._close()
            return
        if self._stream:
            await self._pass_event(body, more)
        else:
            await self._pass_whole(body, more)

    async def _wait(self) -> None:
        if self._injection is None:
            return
        if self._events == 0:
            loop = asyncio.get_running_loop()
            due = self._arrived + self._injection.seconds("ttft_ms")
            await asyncio.sleep(due - loop.time())
        else:
            await asyncio.sleep(self._injection.seconds("itl_ms"))

    async def _pass_event(self, body: bytes, more: bool) -> None:
        effects = self._effects
        if self._events == effects.drop_after:
            self._close()
            return
        if self._events == effects.stall_after:
            await self._stall()
            return
        if self._events == effects.malformed_after:
            self._entry.spoilt = True
            body = body[: len(body) // 2] + b"\n\n"
        self._events += 1
        await self._out(body, more)

    async def _pass_whole(self, body: bytes, more: bool) -> None:
        effects, self._events = self._effects, self._events + 1
        half = body[: len(body) // 2]
        if effects.drop_after is not None:
            await self._out(half, True)
            self._close()
        elif effects.stall_after is not None:
            await self._out(half, True)
            await self._stall()
        elif effects.malformed_after is not None and self._head is not None:
            self._entry.spoilt = True
            headers = [h for h in self._head["headers"] if h[0] != b"content-length"]
            self._head["headers"] = [*headers, (b"content-length", b"%d" % len(half))]
            await self._out(half, more)
        else:
            await self._out(body, more)

    async def _out(self, body: bytes, more: bool) -> None:
        entry = self._entry
        if self._head is not None:
            head, self._head = self._head, None
            await self._send(head)
        if len(entry.sent) + len(body) <= MAX_BYTES:
            entry.sent += body
        failed = (entry.status or 0) >= 400 or body.startswith(b'data: {"error"')
        if not more or failed:
            spoilt: Any = "truncated" if entry.spoilt else "complete"
            self._log.end(entry, "error" if failed else spoilt)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _stall(self) -> None:
        self._entry.spoilt = True
        self.closed = True
        await _until_gone(self._receive)

    def _close(self) -> None:
        self.closed = self._entry.spoilt = True
        self._scope[CLOSE]()


def _error(effects: Effects) -> ApiError:
    status = effects.error or 500
    said = _MESSAGES.get(status, f"status {status}")
    headers = {}
    if effects.retry_after is not None:
        headers["retry-after"] = f"{effects.retry_after:g}"
    return ApiError(status, f"{said} (injected).", code="injected", headers=headers)


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with a body that has been read."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
