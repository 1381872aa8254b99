"""Pieces on their way to an event loop: one wake for many, and none lost."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.engine.generation.generation import Piece
from elastic_moe.engine.streams import AsyncPieces, LoopMails


def piece(number: int) -> Piece:
    """One whose token is a number."""
    generation: Any = SimpleNamespace(index=0)
    return Piece(generation, number, "", None, None)


async def number(pieces: AsyncPieces) -> int:
    """The next one's."""
    delta = await asyncio.wait_for(pieces.next(), 10)
    return delta.token_ids[0]


def test_a_loop_is_woken_once_for_all_that_waits() -> None:
    async def run() -> tuple[list[int], int, int]:
        mail = LoopMails().of_running_loop()
        readers = [AsyncPieces(mail) for _ in range(3)]
        loop, wakes = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return wake(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]

        def post(numbers: range) -> None:
            for i in numbers:
                readers[i % 3].put(piece(i))
            for reader in readers:
                reader.flush()

        def run_thread(numbers: range) -> None:
            poster = threading.Thread(target=post, args=(numbers,))
            poster.start()
            poster.join()  # the loop is busy here

        run_thread(range(15))
        run_thread(range(15, 30))
        once = wakes
        got = [await number(reader) for _ in range(10) for reader in readers]
        run_thread(range(30, 31))  # it wakes again
        return [*got, await number(readers[0])], once, wakes

    got, once, wakes = asyncio.run(run())
    assert got == list(range(31))
    assert (once, wakes) == (1, 2)


def test_what_is_put_waits_for_the_flush() -> None:
    async def run() -> bool:
        pieces = AsyncPieces(LoopMails().of_running_loop())
        pieces.put(piece(0))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pieces.next(), 0.05)
        pieces.flush()
        return await number(pieces) == 0  # the one who gave up took nothing

    assert asyncio.run(run())


def test_an_error_wakes_without_a_flush_and_comes_last() -> None:
    async def run() -> None:
        pieces = AsyncPieces(LoopMails().of_running_loop())
        pieces.put(piece(0))
        threading.Thread(target=pieces.fail, args=(ValueError("gone"),)).start()
        assert await number(pieces) == 0
        with pytest.raises(ValueError, match="gone"):
            await number(pieces)

    asyncio.run(run())


def test_a_reader_that_gave_up_just_as_it_was_woken_loses_nothing() -> None:
    async def run() -> list[int]:
        pieces = AsyncPieces(LoopMails().of_running_loop())
        waiting = asyncio.ensure_future(pieces.next())
        await asyncio.sleep(0)
        waiting.cancel()
        pieces.take(piece(0))  # its future is cancelled, it has not run yet
        pieces.take(piece(1))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        waiting = asyncio.ensure_future(pieces.next())
        await asyncio.sleep(0)
        return [(await waiting).token_ids[0], await number(pieces)]

    assert asyncio.run(run()) == [0, 1]


def test_nothing_is_lost_between_a_wake_and_the_next() -> None:
    async def run() -> list[int]:
        pieces = AsyncPieces(LoopMails().of_running_loop())

        def post() -> None:
            for i in range(20_000):
                pieces.put(piece(i))
                pieces.flush()

        poster = threading.Thread(target=post)
        poster.start()
        got = [await number(pieces) for _ in range(20_000)]
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
        mail = LoopMails().of_running_loop()
        return mail, AsyncPieces(mail)

    mail, pieces = asyncio.run(run())
    for i in range(3):
        pieces.put(piece(i))
        pieces.flush()
    assert not pieces._items
    assert not mail._items
