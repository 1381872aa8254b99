"""Outputs on their way to an event loop: one wake for many, and none lost."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.engine.request import SequenceOutput
from elastic_moe.engine.streams import AsyncOutputs, LoopNotifiers


def output(number: int) -> SequenceOutput:
    """One whose token is a number."""
    sequence: Any = SimpleNamespace(index=0)
    return SequenceOutput(sequence, number, "", None, None)


async def number(outputs: AsyncOutputs) -> int | None:
    """The next one's."""
    return (await asyncio.wait_for(outputs.get(), 10)).token_id


def test_a_loop_is_woken_once_for_all_that_waits() -> None:
    async def run() -> tuple[list[int], int, int]:
        notifier = LoopNotifiers().of_running_loop()
        readers = [AsyncOutputs(notifier) for _ in range(3)]
        loop, wakes = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return wake(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]

        def post(numbers: range) -> None:
            for i in numbers:
                readers[i % 3].put(output(i))
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
        outputs = AsyncOutputs(LoopNotifiers().of_running_loop())
        outputs.put(output(0))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(outputs.get(), 0.05)
        outputs.flush()
        return await number(outputs) == 0  # the one who gave up took nothing

    assert asyncio.run(run())


def test_an_error_wakes_without_a_flush_and_comes_last() -> None:
    async def run() -> None:
        outputs = AsyncOutputs(LoopNotifiers().of_running_loop())
        outputs.put(output(0))
        threading.Thread(target=outputs.fail, args=(ValueError("gone"),)).start()
        assert await number(outputs) == 0
        with pytest.raises(ValueError, match="gone"):
            await number(outputs)

    asyncio.run(run())


def test_a_reader_that_gave_up_just_as_it_was_woken_loses_nothing() -> None:
    async def run() -> list[int]:
        outputs = AsyncOutputs(LoopNotifiers().of_running_loop())
        waiting = asyncio.ensure_future(outputs.get())
        await asyncio.sleep(0)
        waiting.cancel()
        outputs.take(output(0))  # its future is cancelled, it has not run yet
        outputs.take(output(1))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        waiting = asyncio.ensure_future(outputs.get())
        await asyncio.sleep(0)
        return [(await waiting).token_id, await number(outputs)]

    assert asyncio.run(run()) == [0, 1]


def test_nothing_is_lost_between_a_wake_and_the_next() -> None:
    async def run() -> list[int]:
        outputs = AsyncOutputs(LoopNotifiers().of_running_loop())

        def post() -> None:
            for i in range(20_000):
                outputs.put(output(i))
                outputs.flush()

        poster = threading.Thread(target=post)
        poster.start()
        got = [await number(outputs) for _ in range(20_000)]
        poster.join()
        return got

    assert asyncio.run(run()) == list(range(20_000))


def test_a_loop_has_one_mail_for_as_long_as_somebody_reads() -> None:
    notifiers = LoopNotifiers()

    async def run() -> bool:
        notifier = notifiers.of_running_loop()
        return notifiers.of_running_loop() is notifier

    assert asyncio.run(run())
    assert len(notifiers._notifiers) == 0  # nothing of a loop that has ended is kept


def test_mail_for_a_closed_loop_goes_nowhere() -> None:
    async def run() -> Any:
        notifier = LoopNotifiers().of_running_loop()
        return notifier, AsyncOutputs(notifier)

    notifier, outputs = asyncio.run(run())
    for i in range(3):
        outputs.put(output(i))
        outputs.flush()
    assert not outputs._items
    assert not notifier._items
