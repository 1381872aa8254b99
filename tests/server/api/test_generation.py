"""What generating endpoints share: disconnecting cancels a request."""

from __future__ import annotations

import json
import socket

from tests.server.conftest import Running


def test_a_client_that_goes_ends_its_request(served: Running) -> None:
    """Whether it streams or waits for the whole."""
    for stream in (True, False):
        body = json.dumps(
            {
                "model": "tiny",
                "prompt": "The",
                "max_tokens": 600,
                "ignore_eos": True,
                "stream": stream,
            }
        ).encode()
        host, port = served.url.removeprefix("http://").split(":")
        before = served.engine.stats().steps
        with socket.create_connection((host, int(port))) as client:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            client.sendall(head.encode() + body)
            while served.engine.stats().steps < before + 20:
                pass
        served.idle()
        assert served.engine.stats().steps < before + 500
