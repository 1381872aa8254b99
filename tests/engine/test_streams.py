"""Pieces on their way to an event loop: one wake for many, and none lost."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from elastic_moe.engine.streams import LoopMails


def test_a_loop_is_woken_once_for_all_that_waits() -> None:
    async def run() -> tuple[list[int], int]:
        mail, queues = LoopMails().of_running_loop(), [asyncio.Queue[int]() for _ in range(3)]
        loop, wakes = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return wake(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        poster = threading.Thread(
            target=lambda: [mail.post(queues[i % 3], i) for i in range(30)]  # type: ignore[func-returns-value]
        )
        poster.start()
        poster.join()  # the loop is busy here
        once = wakes
        got = [await queue.get() for _ in range(10) for queue in queues]
        poster = threading.Thread(target=mail.post, args=(queues[0], 30))  # it wakes again
        poster.start()
        return [*got, await asyncio.wait_for(queues[0].get(), 10)], once

    got, wakes = asyncio.run(run())
    assert got == list(range(31))
    assert wakes == 1


def test_nothing_is_lost_between_a_wake_and_the_next() -> None:
    async def run() -> list[int]:
        mail, queue = LoopMails().of_running_loop(), asyncio.Queue[int]()

        def post() -> None:
            for i in range(20_000):
                mail.post(queue, i)

        poster = threading.Thread(target=post)
        poster.start()
        got = [await asyncio.wait_for(queue.get(), 10) for _ in range(20_000)]
        poster.join()
        return got

    assert asyncio.run(run()) == list(range(20_000))


def test_a_loop_has_one_mail_for_as_long_as_somebody_reads() -> None:
    mails = LoopMails()

    async def run() -> bool:
        mail = mails.of_running_loop()
        return mails.of_running_loop() is mail

    assert asyncio.run(run())
    assert len(mails._mails) == 0  # nothing of a loop that has ended is kept


def test_mail_for_a_closed_loop_goes_nowhere() -> None:
    async def run() -> Any:
        return LoopMails().of_running_loop(), asyncio.Queue[int]()

    mail, queue = asyncio.run(run())
    for i in range(3):
        mail.post(queue, i)
    assert queue.empty()
    assert not mail._items
