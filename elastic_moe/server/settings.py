"""`ServerSettings`: what an operator decides; `elastic-moe serve` reads it from its options."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from elastic_moe.config import Routing
from elastic_moe.errors import ServerError
from elastic_moe.server.routing.limits import Limits

_KEY = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of a server, checked when made.

    Attributes:
        host, port: address to listen on; port 0 takes a free one.
        api_keys: requests need one of them; with none, requests need no key.
        aliases: further names of the model.
        routing: sub-network of requests that ask for none; None for the full network.
        seed: seed of requests that have none; None draws one for each.
        max_body_bytes: size limit of request bodies.
        drain_seconds: time for running requests to finish at shutdown; the rest get an error.
        read_timeout_seconds: time for the body of a request to arrive.
        request_timeout_seconds: time for a whole request; then it gets 504, or an error in its
            stream. None for no limit.
        admin_keys: /admin/* needs one of them; with none, it refuses everyone.
        profiles: TOML file of the profiles; None for the built-in ones.
        limits: allowed range of each elastic axis.
        inject: fault injection; 'remote' starts with that preset.
        expose_without_keys: allow other addresses than loopback without API keys.

    Raises:
        ServerError: a value is out of range, or the settings are unsafe together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    routing: Routing = None
    seed: int | None = None
    max_body_bytes: int = 16 << 20
    drain_seconds: float = 30.0
    read_timeout_seconds: float = 60.0
    request_timeout_seconds: float | None = None
    admin_keys: tuple[str, ...] = ()
    profiles: Path | None = None
    limits: Limits = field(default_factory=Limits)
    inject: Literal["off", "on", "remote"] = "off"
    expose_without_keys: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ServerError(f"port must be in [0, 65535], got {self.port}.")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ServerError(f"seed must be in [-2**63, 2**64 - 1], got {self.seed}.")
        if not 0 <= self.drain_seconds <= 86400:
            raise ServerError(f"drain_seconds must be in [0, 86400], got {self.drain_seconds}.")
        for name in ("read_timeout_seconds", "request_timeout_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds <= 86400:
                raise ServerError(f"{name} must be above 0 and at most 86400, got {seconds}.")
        for kind, keys in (("API", self.api_keys), ("admin", self.admin_keys)):
            for number, key in enumerate(keys, 1):
                if not _KEY.fullmatch(key):  # never show the key
                    raise ServerError(
                        f"{kind} key {number} must be 1 to 512 printable ASCII characters "
                        f"without blanks."
                    )
        if set(self.api_keys) & set(self.admin_keys):
            raise ServerError("an admin key is an API key too; who may ask must not administer.")
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
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
