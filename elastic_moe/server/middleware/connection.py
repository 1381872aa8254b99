"""uvicorn's connection, which an answer may close before its end."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from elastic_moe.server.middleware.injector import CLOSE


class Connection(HttpToolsProtocol):
    """Tells every request how to close its connection."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope
        scope[CLOSE] = self.transport.close
