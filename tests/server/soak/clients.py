"""Many streaming clients at once, of which some leave: clients.py HOST PORT < ASKED > GOT.

ASKED is a JSON list of {"path", "body", "leave_after": events or null, "abort": bool}; GOT one of
{"status", "ended": "done" | "left" | "broken", "events": [...]}. All connect before the first one
asks. It needs the standard library alone, in a process of its own: the server's is looked at.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

SECONDS = 300  # for one wave


async def ask(
    request: dict[str, Any], host: str, port: int, connected: asyncio.Barrier
) -> dict[str, Any]:
    """One client."""
    reader, writer = await asyncio.open_connection(host, port)
    await connected.wait()
    content = json.dumps(request["body"]).encode()
    head = f"POST {request['path']} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    got: dict[str, Any] = {"status": status, "ended": "broken", "events": []}
    try:
        if status == 200:
            async for event in events(reader):
                if event == "[DONE]":
                    got["ended"] = "done"
                    break
                got["events"].append(json.loads(event))
                if len(got["events"]) == request["leave_after"]:
                    got["ended"] = "left"
                    break
    finally:
        if request["abort"] and got["ended"] == "left":
            writer.transport.abort()  # a reset, and not a good-bye
        else:
            writer.close()
    return got


async def events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """What every event of a chunked answer holds."""
    rest = b""
    while size := int(await reader.readline(), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            yield event.removeprefix(b"data: ").decode()


async def main() -> None:
    host, port, asked = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
    connected = asyncio.Barrier(len(asked))
    clients = (ask(request, host, port, connected) for request in asked)
    async with asyncio.timeout(SECONDS):
        json.dump(await asyncio.gather(*clients), sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
