"""Checks of the `openai` client: many requests at once, and requests that are given up."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.request import Request, urlopen

import openai

from tests.interop.checks import Tally
from tests.interop.openai_checks.asking import At, arguments, chat_arguments, same_choices
from tests.interop.openai_checks.text import join

IDLE_SECONDS = 10
UNFINISHED = re.compile(r"^elastic_moe:requests_unfinished\{[^}]*\} (\S+)$", re.MULTILINE)


def asynchronous(at: At, tally: Tally) -> None:
    """async: AsyncOpenAI gets the engine's answers, streams and lists, all at once"""

    async def ask() -> None:
        async with at.new_async() as client:
            crowd, chats = at.wanted["crowd"], at.wanted["chat_subnets"]
            asked = [client.completions.create(**_own(at, case)) for case in crowd]
            chatted = [
                client.chat.completions.create(
                    **chat_arguments(case, f"{at.model}@{case['subnet']}")
                )
                for case in chats
            ]
            streamed = [read(client, case) for case in crowd]
            done = await asyncio.gather(*asked, *chatted, *streamed)
            for case, answer in zip(crowd, done, strict=False):
                same_choices(tally, answer.choices, case, chat=False)
            for case, answer in zip(chats, done[len(crowd) :], strict=False):
                same_choices(tally, answer.choices, case, chat=True)
            for case, text in zip(crowd, done[len(crowd) + len(chats) :], strict=True):
                tally.equal(text, case["wanted"]["choices"][0]["text"], "streamed text")
            names = [card.id async for card in client.models.list()]
            tally.equal(names[0], at.model, "models")
            own = at.wanted["embeddings"][0]
            answer = await client.embeddings.create(model=at.model, input=own["text"])
            tally.close(answer.data[0].embedding, own["vector"], "embedding", 1e-7)

    async def read(client: openai.AsyncOpenAI, case: dict[str, Any]) -> str:
        stream = await client.completions.create(**_own(at, case), stream=True)
        pieces = [piece.choices[0].text async for piece in stream if piece.choices]
        return "".join(pieces)

    asyncio.run(ask())


def threads(at: At, tally: Tally) -> None:
    """threads: 16 streams at once of one client, each as if it were alone, three times"""
    crowd = at.wanted["crowd"]

    def read(case: dict[str, Any]) -> list[Any]:
        choices, _ = join(at.client.completions.create(**_own(at, case), stream=True))
        return choices

    with ThreadPoolExecutor(len(crowd)) as pool:
        for _ in range(3):
            for case, choices in zip(crowd, pool.map(read, crowd), strict=True):
                same_choices(tally, choices, case, chat=False)


def closed_streams(at: At, tally: Tally) -> None:
    """cancel: a stream that is closed, or dropped by an event loop, ends on the server"""
    own = _endless(at)
    for _ in range(3):
        with at.client.completions.create(**own, stream=True) as stream:
            tally.true(next(iter(stream)).choices, "a first chunk")
        tally.true(_idle(at), "the server is idle after a closed stream")

    async def cancel() -> None:
        async with at.new_async() as client:
            task = asyncio.create_task(client.completions.create(**own))
            await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            tally.true(task.cancelled(), "the task is cancelled")

    asyncio.run(cancel())
    tally.true(_idle(at), "the server is idle after a cancelled task")


def timeouts(at: At, tally: Tally) -> None:
    """cancel: a request that a client's timeout ends is an APITimeoutError, and ends there too"""
    for own in (_endless(at), {**_endless(at), "n": 4}):
        tally.raises(
            openai.APITimeoutError,
            partial(at.client.completions.create, **own, timeout=0.3),
            "a timeout",
        )
        tally.true(_idle(at), "the server is idle after a timeout")


def _own(at: At, case: dict[str, Any]) -> dict[str, Any]:
    return arguments(case["body"], f"{at.model}@{case['subnet']}")


def _endless(at: At) -> dict[str, Any]:
    return {
        "model": at.model,
        "prompt": "The",
        "max_tokens": at.wanted["max_model_len"] - 10,
        "extra_body": {"ignore_eos": True},
    }


def _idle(at: At) -> bool:
    """Whether the engine soon has nothing to do, as /metrics tells."""
    asked = Request(f"{at.url}/metrics", headers={"authorization": f"Bearer {at.key}"})
    until = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < until:
        with urlopen(asked, timeout=IDLE_SECONDS) as answer:
            found = UNFINISHED.search(answer.read().decode())
        if found is not None and float(found[1]) == 0:
            return True
        time.sleep(0.05)
    return False


CHECKS = (asynchronous, threads, closed_streams, timeouts)
