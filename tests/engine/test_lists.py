"""Lists of prompts: one policy for every way to call. They fill the queue and never overflow it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic_moe import Completion, Delta, Engine, SamplingParams
from elastic_moe.engine.request import Sequence
from elastic_moe.engine.stats import StepRecord
from elastic_moe.errors import EngineError, QueueFullError, RequestError
from tests.engine.holding import held

LONG = SamplingParams(max_tokens=300, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
PROMPTS = [[n, 7, 8, 9] for n in range(20, 50)]
PARAMS = [LONG] + [SHORT] * 29
STEPS: list[StepRecord] = []


@pytest.fixture
def engine(tiny_folder: Path) -> Iterator[Engine]:
    """Three requests in the queue, two in a step."""
    STEPS.clear()
    with Engine.from_pretrained(
        tiny_folder, dtype="float32", max_num_seqs=2, max_queue=3, on_step=STEPS.append
    ) as engine:
        yield engine


def idle(engine: Engine) -> None:
    until = time.monotonic() + 20
    while engine.stats().unfinished:
        assert time.monotonic() < until, engine.stats()
        time.sleep(0.005)
    engine.check_integrity()
    assert engine.stats().used_blocks == 0


def completed(deltas: list[Delta]) -> list[Completion]:
    """The completions of a streamed list, in the order of its prompts."""
    done = {delta.prompt: delta.completion for delta in deltas if delta.completion is not None}
    return [done[prompt] for prompt in sorted(done)]


def call(engine: Engine, way: str, *arguments: Any) -> list[Completion]:
    """The completions of a list, whichever way it is asked for."""
    if way == "generate":
        return engine.generate(*arguments)
    if way == "stream":
        return completed(list(engine.stream(*arguments)))

    async def read() -> list[Completion]:
        if way == "agenerate":
            done: list[Completion] = await engine.agenerate(*arguments)
            return done
        return completed([delta async for delta in engine.astream(*arguments)])

    return asyncio.run(read())


WAYS = ["generate", "agenerate", "stream", "astream"]


@pytest.mark.parametrize("way", WAYS)
def test_a_list_refills_the_queue_when_any_of_its_prompts_ends(engine: Engine, way: str) -> None:
    """One long prompt and many short ones, in a queue of three: the short ones do not wait."""
    done = call(engine, way, PROMPTS, None, PARAMS)
    assert [len(c.token_ids) for c in done] == [300] + [3] * 29
    last_step = {number: at for at, step in enumerate(STEPS) for number, _, _ in step.parts}
    assert len(last_step) == 30
    assert max(last_step[number] for number in range(1, 30)) < last_step[0] / 2
    assert engine.stats().waiting == 0
    idle(engine)


@pytest.mark.parametrize("way", WAYS)
def test_a_list_gives_what_its_prompts_give_alone(engine: Engine, way: str) -> None:
    names = ["full", "k1", "L3", "w2"]
    want = [engine.generate(p, n, SHORT) for p, n in zip(PROMPTS[:4], names, strict=True)]
    got = call(engine, way, PROMPTS[:4], names, SHORT)
    assert [c.choices for c in got] == [c.choices for c in want]
    assert [c.routing for c in got] == [c.routing for c in want]
    if way in ("generate", "agenerate"):
        assert call(engine, way, [], None, SHORT) == []
    else:  # there is nothing to read: it is taken for a prompt
        with pytest.raises(RequestError, match="no tokens"):
            call(engine, way, [], None, SHORT)


def test_pieces_of_a_list_say_whose_they_are(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, n=2, temperature=1.0, logprobs=0)
    deltas = list(engine.stream(PROMPTS[:5], None, params))
    done = completed(deltas)
    assert len(done) == 5
    for prompt, completion in enumerate(done):
        for choice in completion.choices:
            own = [d for d in deltas if (d.prompt, d.choice) == (prompt, choice.index)]
            assert "".join(d.text for d in own) == choice.text
            assert tuple(t for d in own for t in d.token_ids) == choice.token_ids
            assert own[-1].finish_reason == "length"


def test_lists_and_single_calls_share_the_queue(engine: Engine) -> None:
    """Two lists longer than the queue at once; a single call is refused while it is full."""
    with ThreadPoolExecutor(2) as pool:
        with held(engine):
            lists = [pool.submit(engine.generate, PROMPTS, None, SHORT)]
            while engine.stats().unfinished < 3:
                time.sleep(0.001)
            with pytest.raises(QueueFullError, match="3 requests are unfinished"):
                engine.stream(PROMPTS[0], None, SHORT)
            with pytest.raises(QueueFullError):
                engine.generate(PROMPTS, None, SHORT)
        assert len(lists[0].result(timeout=60)) == 30
    idle(engine)


def test_concurrent_lists_take_turns(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the order of service: what entered the queue first runs first."""
    append, begun = Sequence.append, []

    def watched(sequence: Sequence, *arguments: Any) -> Any:
        if not sequence.num_output_tokens:
            begun.append(sequence.request.params.max_tokens)
        return append(sequence, *arguments)

    monkeypatch.setattr(Sequence, "append", watched)
    with Engine.from_pretrained(
        tiny_folder, dtype="float32", max_num_seqs=1, max_queue=4
    ) as engine:
        with ThreadPoolExecutor(2) as pool, held(engine):
            first = pool.submit(engine.generate, PROMPTS, None, SHORT)
            while engine.stats().unfinished < 2:  # of one list, no more
                time.sleep(0.001)
            second = pool.submit(engine.generate, PROMPTS, None, SamplingParams(max_tokens=4))
            while engine.stats().unfinished < 4:
                time.sleep(0.001)
        assert len(first.result(60)) == len(second.result(60)) == 30
        idle(engine)
    assert len(begun) == 60
    for at in range(4, 56):  # half-way through one list, the other is half-way too
        assert abs(begun[:at].count(3) - at / 2) <= 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_stream_that_fails_ends_them_all(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    append = Sequence.append

    def faulty(sequence: Sequence, *arguments: Any) -> Any:
        if sequence.request.prompt_index == 1 and sequence.num_output_tokens == 3:
            raise ValueError("cursed")
        return append(sequence, *arguments)

    monkeypatch.setattr(Sequence, "append", faulty)
    got: list[Delta] = []

    async def read() -> None:
        async for delta in engine.astream(PROMPTS, None, LONG):
            got.append(delta)  # noqa: PERF401  (what came before the error counts)

    def read_all() -> None:
        if asynchronous:
            asyncio.run(asyncio.wait_for(read(), 20))
        else:
            for delta in engine.stream(PROMPTS, None, LONG):
                got.append(delta)  # noqa: PERF402

    with pytest.raises(ValueError, match="cursed"):
        read_all()
    assert [len(delta.token_ids) for delta in got if delta.prompt == 1] == [1] * 3
    assert {delta.prompt for delta in got} == {0, 1}
    idle(engine)
    assert engine.stats().steps < 290


def test_dropping_a_streamed_list_cancels_what_waits_too(engine: Engine) -> None:
    stream = engine.stream(PROMPTS, None, LONG)
    next(stream)
    stream.close()
    assert list(stream) == []
    idle(engine)
    assert engine.stats().steps < 290


def test_closing_lets_a_list_end_or_fails_it(tiny_folder: Path) -> None:
    for seconds, params in ((60.0, SHORT), (0.0, LONG)):
        engine = Engine.from_pretrained(tiny_folder, max_num_seqs=1)
        with ThreadPoolExecutor(1) as pool:
            with held(engine):
                waiting = pool.submit(engine.generate, PROMPTS, None, params)
                while not engine.stats().unfinished:
                    time.sleep(0.001)
            engine.close(seconds)
            if seconds:
                assert len(waiting.result(60)) == 30
            else:
                with pytest.raises(EngineError, match="closed before the request had ended"):
                    waiting.result(60)
