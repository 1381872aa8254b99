"""What an operator decides about a server."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from elastic_moe.config import Routing
from elastic_moe.errors import ServerError

_KEY = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Attributes are those of `elastic-moe serve --help`.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        api_keys: any of them opens the server; none leaves it open to all who reach it.
        aliases: names that the model answers to, besides its own.
        routing: the sub-network of requests that ask for none; None for the whole network.
        max_body_bytes: of a request.
        drain_seconds: how long running requests may take to end when the server is told to.
        expose_without_keys: listen on other addresses than loopback though nobody needs a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    routing: Routing = None
    max_body_bytes: int = 16 << 20
    drain_seconds: float = 30.0
    expose_without_keys: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ServerError(f"port must be in [0, 65535], got {self.port}.")
        if not 0 <= self.drain_seconds <= 86400:
            raise ServerError(f"drain_seconds must be in [0, 86400], got {self.drain_seconds}.")
        for number, key in enumerate(self.api_keys, 1):
            if not _KEY.fullmatch(key):  # the key itself is not told
                raise ServerError(
                    f"API key {number} must be 1 to 512 printable ASCII characters without blanks."
                )
        for alias in self.aliases:
            if not alias or "@" in alias:
                raise ServerError(
                    f"an alias must be a name without '@', which begins a sub-network, "
                    f"got {alias!r}."
                )
        if not (self.api_keys or self.expose_without_keys or is_loopback(self.host)):
            raise ServerError(
                f"host {self.host} can be reached from other machines, and no API key is set. "
                f"Set one, listen on 127.0.0.1, or pass --expose-without-keys."
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
