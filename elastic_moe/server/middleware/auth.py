"""API keys: `Authorization: Bearer KEY`. /admin/* needs an admin key instead."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from elastic_moe.server.errors import ApiError

# For monitoring. /metrics too, as in vLLM: scrapers send no key, and it holds no prompts.
OPEN_PATHS = {"/health", "/ready", "/metrics"}


class Authentication:
    """ASGI middleware: raises `ApiError` 401 without a valid key, 403 for /admin/* without keys.

    Args:
        api_keys: any of them is valid; with none, requests need no key.
        admin_keys: valid for /admin/*; with none, these endpoints refuse everyone.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]
        self._admin_keys = [key.encode() for key in admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            self._check(scope["path"], dict(scope["headers"]).get(b"authorization", b""))
        await self._app(scope, receive, send)

    def _check(self, path: str, authorization: bytes) -> None:
        admin = path.startswith("/admin/")
        if admin and not self._admin_keys:
            raise ApiError(
                403,
                "the admin endpoints are shut: the server was started without --admin-keys.",
                code="no_admin_keys",
            )
        keys = self._admin_keys if admin else self._api_keys
        scheme, _, key = authorization.partition(b" ")
        if keys and not (scheme.lower() == b"bearer" and _matches_any(key.strip(), keys)):
            raise ApiError(
                401,
                f"an {'admin' if admin else 'API'} key is needed: 'Authorization: Bearer KEY' "
                f"with a key of this server.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _matches_any(key: bytes, keys: Iterable[bytes]) -> bool:
    """Compares with every key in constant time, so that timing reveals nothing."""
    return sum(hmac.compare_digest(key, one) for one in keys) > 0
