"""/health and /ready."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2

from elastic_moe import Engine
from elastic_moe.server.run import Server
from elastic_moe.server.settings import ServerSettings
from tests.server.conftest import Running


def test_health_and_readiness(served: Running) -> None:
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/ready").status_code == 200


def test_a_server_that_ends_is_not_ready(tiny_folder: Path) -> None:
    server = Server(Engine.from_pretrained(tiny_folder), ServerSettings(drain_seconds=0))

    async def ask(path: str) -> int:
        transport = httpx2.ASGITransport(app=server.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get(path)).status_code

    assert asyncio.run(ask("/ready")) == 200
    server.stop()
    assert asyncio.run(ask("/ready")) == 503
    assert server.should_exit
