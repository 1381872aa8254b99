"""Clients that do what no library does: send half a body, go away, read nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.server.conftest import Running

LONG = {"model": "tiny", "prompt": "The", "max_tokens": 600, "ignore_eos": True}


@contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    """A connection to a server."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        yield client


def head(path: str, length: int) -> bytes:
    """Of a request with a body of so many bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def request(path: str = "/v1/completions", **body: Any) -> bytes:
    """A whole request."""
    content = json.dumps(body or LONG).encode()
    return head(path, len(content)) + content


def read_to_end(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    got = b""
    while data := client.recv(1 << 16):
        got += data
    return got


def leave(running: Running, *, stream: bool, steps: int = 20) -> None:
    """Ask for many tokens, and go when the engine has made some."""
    before = running.engine.stats().steps
    with connected(running) as client:
        client.sendall(request(**LONG, stream=stream))
        until = time.monotonic() + 20
        while running.engine.stats().steps < before + steps:
            assert time.monotonic() < until
            time.sleep(0.001)
