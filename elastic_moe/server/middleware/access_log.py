"""The outermost middleware: one access record per request, and a response for every failure."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_moe.server.errors import as_api_error, log_failure
from elastic_moe.server.middleware.rate_limits import rate_limit_headers
from elastic_moe.server.middleware.request_id import request_id
from elastic_moe.server.observe import logs
from elastic_moe.server.observe.access_record import (
    ACCESS_RECORD,
    MAX_KEPT_BYTES,
    OTHER_ENDPOINT,
    AccessRecord,
)
from elastic_moe.server.service import Service


class AccessLog:
    """ASGI middleware: records each request, logs and counts it when it ends.

    Adds x-request-id and x-ratelimit-* to responses. Other middlewares raise `ApiError`; it
    becomes a response here. No other middleware wraps `send`, except fault injection: what is done
    per message is paid for every streamed token.

    Args:
        limited_paths: get x-ratelimit-*, as their requests wait in the engine's queue.
    """

    def __init__(self, app: ASGIApp, service: Service, limited_paths: Collection[str]) -> None:
        self._app, self._service, self._limited_paths = app, service, limited_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own_id = request_id(dict(scope["headers"]))
        record = scope[ACCESS_RECORD] = AccessRecord(own_id, scope["method"], scope["path"])

        async def recorded_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not record.response_complete:
                record.disconnected = True
            return message

        async def recorded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                self._add_headers(record, message)
            else:
                if record.response_body is not None:
                    _keep(record.response_body, message.get("body", b""))
                if not message.get("more_body", False):
                    record.response_complete = True
                    record.end()  # before the client has it: it may read the record at once
                elif record.failed:
                    record.end()
            await send(message)

        try:
            await self._app(scope, recorded_receive, recorded_send)
        except Exception as error:
            answer = as_api_error(error)
            if answer.status == 500:
                log_failure(error)
            if record.status is not None:
                record.failed = True
                raise
            await answer.response()(scope, receive, recorded_send)
        finally:
            record.end()
            record.endpoint = _endpoint(scope)
            self._service.metrics.observe(record)
            logs.log_request(record)
            record.completions = []  # the history keeps records, not logprobs

    def _add_headers(self, record: AccessRecord, message: Message) -> None:
        headers = MutableHeaders(scope=message)
        headers["x-request-id"] = record.request_id
        if record.path in self._limited_paths and record.status != 401:
            headers.update(rate_limit_headers(self._service.engine, self._service.metrics))


def _keep(kept: bytearray, body: bytes) -> None:
    if len(kept) + len(body) <= MAX_KEPT_BYTES:
        kept += body


def _endpoint(scope: Scope) -> str:
    """The declared path, such as /v1/models/{model}: clients must not choose metric labels."""
    route = scope.get("route")
    if route is not None:
        return str(route.path)
    path, routes = scope["path"], scope["app"].routes  # refused before routing
    return path if any(getattr(r, "path", None) == path for r in routes) else OTHER_ENDPOINT
