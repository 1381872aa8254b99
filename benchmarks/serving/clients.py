"""Clients that stream as fast as they can, in a process of their own: clients.py.

One line of JSON asks for a batch: {"address": [host, port], "requests": [{"path", "body"}]}. All
connect, then all ask, then they read until the last answer has ended; what came is looked at
afterwards. The reply is one line: {"seconds", "first_seconds", "answers"}, counted from when the
first request was sent. It needs the standard library alone.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from typing import Any

END = b"0\r\n\r\n"  # of a chunked answer
TIMEOUT_SECONDS = 120


def run_batch(address: list[Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Send all requests at once and read every answer to its end."""
    chosen = selectors.DefaultSelector()
    got: dict[socket.socket, list[bytes]] = {}
    asked = [_request(request) for request in requests]
    for _ in requests:
        client = socket.create_connection((address[0], address[1]), TIMEOUT_SECONDS)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        got[client] = []
        chosen.register(client, selectors.EVENT_READ, client)
    clients, first = list(got), {}
    start = time.perf_counter()
    for client, data in zip(clients, asked, strict=True):
        client.sendall(data)
    left = len(clients)
    while left:
        ready = chosen.select(TIMEOUT_SECONDS)
        if not ready:
            raise SystemExit(f"{left} answers did not end")
        for key, _ in ready:
            reader: socket.socket = key.data
            data = reader.recv(1 << 16)
            pieces = got[reader]
            if not pieces:
                first[reader] = time.perf_counter() - start
            pieces.append(data)
            if data.endswith(END) or not data:
                chosen.unregister(reader)
                left -= 1
    seconds = time.perf_counter() - start
    for client in clients:
        client.close()
    return {
        "seconds": seconds,
        "first_seconds": [first[client] for client in clients],
        "answers": [b"".join(got[client]).decode() for client in clients],
    }


def _request(request: dict[str, Any]) -> bytes:
    content = json.dumps(request["body"]).encode()
    head = (
        f"POST {request['path']} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(run_batch(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
