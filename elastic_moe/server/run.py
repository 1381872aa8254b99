"""The server process: listening socket, start, graceful shutdown."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import FrameType

import uvicorn

from elastic_moe.engine import Engine
from elastic_moe.errors import ServerError
from elastic_moe.server.app import create_app
from elastic_moe.server.middleware.connection import ClosableConnection
from elastic_moe.server.settings import ServerSettings

BACKLOG = 2048
GRACE_SECONDS = 5  # to send the last responses, after the engine has closed


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ServerError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as unless_bound:
            listener = unless_bound.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            unless_bound.pop_all()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServerError(
                f"port {port} of {host} is taken by another program. Choose one with --port, or "
                f"0 for any that is free."
            ) from error
        raise ServerError(f"cannot listen on {host}, port {port}: {error.strerror}.") from error
    listener.listen(BACKLOG)
    listener.set_inheritable(True)
    return listener


def url_of(listener: socket.socket) -> str:
    """The http:// URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves requests until SIGTERM, SIGINT or `stop`.

    Running requests then get `settings.drain_seconds` to finish; the rest receive an error. A
    second signal exits at once.

    Args:
        on_ready: called when the server accepts requests.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServerSettings,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._engine, self._drain_seconds = engine, settings.drain_seconds
        self._on_ready = on_ready
        self.app = create_app(engine, settings)
        super().__init__(
            uvicorn.Config(
                self.app,
                http=ClosableConnection,
                loop="uvloop",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.drain_seconds) + GRACE_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            super().handle_exit(sig, frame)
        else:
            self.stop()

    def stop(self) -> None:
        """Accept no more requests and drain the running ones; returns at once."""
        self.app.state.service.ready = False
        close = partial(self._engine.close, self._drain_seconds)
        threading.Thread(target=close, name="elastic-moe drain", daemon=True).start()
        self.should_exit = True
