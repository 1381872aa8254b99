"""What every request passes first: its id, its key, its size."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_moe.server.errors import ApiError, as_api_error, log_failure
from elastic_moe.server.settings import ServerSettings

OPEN_PATHS = {"/health", "/ready"}  # for who watches the server
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware: refuses requests without a key or with too large a body.

    What the application did not expect becomes an answer here.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        own = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = own
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                log_failure(error)
            if begun:
                raise
            await told.response()(scope, receive, send_with_id)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not _is_one_of(key.strip(), self._keys):
                raise ApiError(
                    401,
                    "an API key is needed: 'Authorization: Bearer KEY' with a key of this server.",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """A body without a length is measured as it comes."""
        left = self._max_body_bytes

        async def limited() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body must have at most {self._max_body_bytes} bytes.",
            code="request_too_large",
        )


def _is_one_of(key: bytes, keys: Iterable[bytes]) -> bool:
    """In a time that does not tell which, or how much of it."""
    return sum(hmac.compare_digest(key, one) for one in keys) > 0
