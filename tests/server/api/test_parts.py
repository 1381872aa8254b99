"""Parts of the server where a whole request seldom comes."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import httpx2

from elastic_moe import Engine
from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.protocol.chat import Message
from elastic_moe.server.api.chat import template_messages
from elastic_moe.server.api.logprobs import LogprobWriter, Place
from elastic_moe.server.run import Server
from elastic_moe.server.settings import ServerSettings


def test_a_server_that_ends_is_not_ready(tiny_folder: Path) -> None:
    server = Server(Engine.from_pretrained(tiny_folder), ServerSettings(drain_seconds=0))

    async def ask(path: str) -> int:
        transport = httpx2.ASGITransport(app=server.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get(path)).status_code

    assert asyncio.run(ask("/ready")) == 200
    server.end()
    assert asyncio.run(ask("/ready")) == 503
    assert server.should_exit


def test_messages_come_to_the_template_as_it_knows_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    told = [
        Message.model_validate(message)
        for message in (
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant"},
        )
    ]
    assert template_messages(told) == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "ab", "name": "ann"},
        {"role": "assistant", "content": ""},
    ]


def test_what_cannot_come_has_a_logprob_that_json_can_say(tiny: Engine) -> None:
    writer = LogprobWriter(tiny.tokenizer)
    never = TokenLogprob(20, -math.inf, ((21, -0.5), (22, -math.inf)))
    (chat,) = writer.chat([never])["content"]
    assert chat["logprob"] == -9999
    assert [top["logprob"] for top in chat["top_logprobs"]] == [-0.5, -9999]
    text = writer.completion([never], Place())
    assert text["token_logprobs"] == [-9999]
    assert list(text["top_logprobs"][0].values()) == [-0.5, -9999]
