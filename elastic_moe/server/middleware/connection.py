"""uvicorn's HTTP connection, which fault injection can close in mid-response."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from elastic_moe.server.middleware.fault_injection import CLOSE_CONNECTION


class ClosableConnection(HttpToolsProtocol):
    """Puts a function that closes the connection into the scope of every request."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope  # a TypedDict that knows no other keys
        scope[CLOSE_CONNECTION] = self.transport.close
