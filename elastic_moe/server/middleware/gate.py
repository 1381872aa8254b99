"""What every request passes first, and last: its id, its key, its size and time, its account."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_moe.server.errors import ApiError, as_api_error, log_failure
from elastic_moe.server.middleware.rate_limits import LIMITED_PATHS, rate_limits
from elastic_moe.server.observe import logs
from elastic_moe.server.observe.account import ACCOUNT, OTHER, Account
from elastic_moe.server.service import Service

REQUEST_ID = "elastic_moe.request_id"  # of a scope
# For who watches the server. /metrics too, as with vLLM: its scrapers send no key, and it tells how
# much was asked for, not what.
OPEN_PATHS = {"/health", "/ready", "/metrics"}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware: refuses requests without a key, or with a body that is too large or late.

    A request whose time is up is told so where it waits for its client to go. What the application
    did not expect becomes an answer here.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service, settings = app, service, service.settings
        self._read_timeout = settings.read_timeout_seconds
        self._request_timeout = settings.request_timeout_seconds
        self._keys = [key.encode() for key in settings.api_keys]
        self._admin_keys = [key.encode() for key in settings.admin_keys]
        self._max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        own = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope[REQUEST_ID] = own
        account = scope[ACCOUNT] = Account(own, scope["method"], scope["path"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                added = MutableHeaders(scope=message)
                added["x-request-id"] = own
                if scope["path"] in LIMITED_PATHS and account.status != 401:
                    added.update(rate_limits(self._service.engine, self._service.metrics))
            elif not message.get("more_body", False):
                account.whole = True
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive, account), send_with_id)
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                log_failure(error)
            if account.status is not None:
                account.failed = True
                raise
            await told.response()(scope, receive, send_with_id)
        finally:
            account.seconds = time.perf_counter() - account.begun
            account.endpoint = _endpoint(scope)
            self._service.metrics.ended(account)
            logs.tell(account)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        admin = scope["path"].startswith("/admin/")
        if admin and not self._admin_keys:
            raise ApiError(
                403,
                "the admin endpoints are shut: the server was started without --admin-keys.",
                code="no_admin_keys",
            )
        keys = self._admin_keys if admin else self._keys
        if keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not _is_one_of(key.strip(), keys):
                raise ApiError(
                    401,
                    f"an {'admin' if admin else 'API'} key is needed: 'Authorization: Bearer KEY' "
                    f"with a key of this server.",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive, account: Account) -> Receive:
        """A body without a length is measured as it comes, and must come in time."""
        left, reading, loop = self._max_body_bytes, True, asyncio.get_running_loop()
        until_read = loop.time() + self._read_timeout
        until = None if self._request_timeout is None else loop.time() + self._request_timeout

        async def limited() -> Any:
            nonlocal left, reading
            try:
                async with asyncio.timeout_at(until_read if reading else until):
                    message = await receive()
            except TimeoutError:
                account.late = "read" if reading else "request"
                raise self._too_late(account.late) from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            reading = reading and message.get("more_body", False)
            if message["type"] == "http.disconnect" and not account.whole:
                account.gone = True
            return message

        return limited

    def _too_late(self, what: str) -> ApiError:
        if what == "read":
            return ApiError(
                408,
                f"the body did not arrive within {self._read_timeout:g} seconds.",
                code="read_timeout",
                headers={"connection": "close"},  # what is still to come of it is not waited for
            )
        return ApiError(
            504,
            f"the request took longer than {self._request_timeout:g} seconds, which is this "
            f"server's limit. Ask for fewer tokens or a smaller sub-network.",
            code="timeout",
        )

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body must have at most {self._max_body_bytes} bytes.",
            code="request_too_large",
        )


def _endpoint(scope: Scope) -> str:
    """The path as it was declared: clients do not choose the names of metrics."""
    route = scope.get("route")
    if route is not None:
        return str(route.path)
    path, routes = scope["path"], scope["app"].routes  # refused before it came to its route
    return path if any(getattr(route, "path", None) == path for route in routes) else OTHER


def _is_one_of(key: bytes, keys: Iterable[bytes]) -> bool:
    """In a time that does not tell which, or how much of it."""
    return sum(hmac.compare_digest(key, one) for one in keys) > 0
