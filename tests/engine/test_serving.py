"""What a request may ask for, and what happens when it fails, is dropped, or comes too often."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_moe import Engine, SamplingParams
from elastic_moe.engine.request import Sequence
from elastic_moe.engine.stats import StepRecord
from elastic_moe.errors import EngineError, QueueFullError, RequestError
from tests.engine.holding import held
from tests.logprobs import log_softmax

PROMPT = list(range(20, 60))
LONG = SamplingParams(max_tokens=590, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def engine(tiny_folder: Path) -> Any:
    with Engine.from_pretrained(tiny_folder, dtype="float32", max_num_seqs=4) as engine:
        yield engine


def idle(engine: Engine) -> None:
    """Wait until nothing runs, then look at the books."""
    until = time.monotonic() + 20
    while engine.stats().unfinished:
        assert time.monotonic() < until, engine.stats()
        time.sleep(0.005)
    engine.check_integrity()
    assert engine.stats().used_blocks == 0


# --- what may be asked for


def test_prompt_logprobs_are_those_of_scoring(tiny: Engine) -> None:
    params = SamplingParams(max_tokens=2, prompt_logprobs=3)
    for _ in range(2):  # the second time its beginning is in the prefix cache
        done = tiny.generate(PROMPT, "L3", params)
        logprobs = log_softmax(tiny.score(PROMPT, "L3"))
        assert done.prompt_logprobs is not None
        assert len(done.prompt_logprobs) == len(PROMPT) - 1
        for position, reported in enumerate(done.prompt_logprobs, 1):
            row = logprobs[position - 1]
            assert reported.token_id == PROMPT[position]
            assert reported.logprob == pytest.approx(float(row[PROMPT[position]]), abs=1e-5)
            assert [t for t, _ in reported.top] == np.argsort(-row)[:3].tolist()
    assert tiny.generate(PROMPT, None, SHORT).prompt_logprobs is None


def test_prompt_logprobs_of_a_prompt_that_takes_many_steps(tiny_folder: Path) -> None:
    with Engine.from_pretrained(
        tiny_folder, dtype="float32", max_num_batched_tokens=7, max_num_seqs=2
    ) as engine:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, n=2)
        done = engine.generate(PROMPT, None, params)
        want = log_softmax(engine.score(PROMPT))
        assert done.prompt_logprobs is not None
        got = [reported.logprob for reported in done.prompt_logprobs]
        expected = want[np.arange(len(PROMPT) - 1), PROMPT[1:]]
        assert np.allclose(got, expected, atol=1e-4)


def test_forced_text_comes_with_the_models_own_numbers(tiny: Engine) -> None:
    text = "the answer is 42"
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    for forced in (text, ids):
        deltas = list(tiny.stream(PROMPT, "k2", SamplingParams(forced_text=forced, logprobs=2)))
        done = deltas[-1].completion
        assert done is not None
        assert done.text == text == "".join(d.text for d in deltas)
        assert done.token_ids == tuple(ids)
        assert done.finish_reason == "stop"
        assert done.usage.completion_tokens == len(ids) == len(deltas)
        rows = log_softmax(tiny.score([*PROMPT, *ids], "k2"))[len(PROMPT) - 1 :]
        for row, reported, token in zip(rows, done.logprobs or (), ids, strict=False):
            assert reported.token_id == token
            assert reported.logprob == pytest.approx(float(row[token]), abs=2e-4)
            assert reported.top[0][0] == int(row.argmax())
    cut = tiny.generate(PROMPT, None, SamplingParams(forced_text=text, max_tokens=2))
    assert (cut.token_ids, cut.finish_reason) == (tuple(ids[:2]), "length")


def test_choices_come_with_their_index(tiny: Engine) -> None:
    params = SamplingParams(max_tokens=5, n=3, temperature=2.0, seed=4, ignore_eos=True, logprobs=0)
    deltas = list(tiny.stream(PROMPT, None, params))
    done = deltas[-1].completion
    assert done is not None
    assert [d.completion for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    for choice in done.choices:
        own = [d for d in deltas if d.choice == choice.index]
        assert "".join(d.text for d in own) == choice.text
        assert tuple(t for d in own for t in d.token_ids) == choice.token_ids
        assert tuple(p for d in own for p in d.logprobs or ()) == choice.logprobs
        assert [d.finish_reason for d in own] == [None] * 4 + ["length"]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert done.choices[0].token_ids == done.token_ids
    assert done.usage.completion_tokens == 15
    assert done.usage.prompt_tokens == len(PROMPT)


def test_tokens_that_stop_and_tokens_that_may_not(tiny: Engine) -> None:
    whole = tiny.generate(PROMPT, None, SHORT)
    third = whole.token_ids[2]
    at = whole.token_ids.index(third)
    params = SamplingParams(max_tokens=6, ignore_eos=True, stop_token_ids=[third])
    stopped = tiny.generate(PROMPT, None, params)
    assert stopped.token_ids == whole.token_ids[: at + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == tiny.decode(whole.token_ids[:at])
    later = SamplingParams(max_tokens=6, ignore_eos=True, stop_token_ids=[third], min_tokens=6)
    done = tiny.generate(PROMPT, None, later)
    assert len(done.token_ids) == 6
    assert third not in done.token_ids[:-1]
    banned = SamplingParams(max_tokens=6, ignore_eos=True, logit_bias={whole.token_ids[0]: -100})
    assert tiny.generate(PROMPT, None, banned).token_ids[0] != whole.token_ids[0]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_follows_its_schema(tiny: Engine, temperature: float) -> None:
    """A random model: nothing but the constraint makes this JSON."""
    for seed in range(3):
        params = SamplingParams(
            max_tokens=200, json_schema=SCHEMA, temperature=temperature, seed=seed, logprobs=0
        )
        done = tiny.generate(PROMPT, "L3", params)
        assert done.finish_reason == "stop", done.text
        read = json.loads(done.text)
        assert set(read) == {"name", "age", "kind"}
        assert len(read["name"]) <= 8
        assert 0 <= read["age"] <= 150
        assert read["kind"] in ("cat", "dog")
        # The log-probabilities are the model's, not those of what was allowed.
        assert done.logprobs is not None
        assert min(reported.logprob for reported in done.logprobs) < -1


def test_json_objects_begin_as_such_and_are_cut_by_max_tokens(tiny: Engine) -> None:
    done = tiny.generate(PROMPT, None, SamplingParams(max_tokens=5, json_object=True))
    assert done.text.startswith("{")
    assert done.finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json_schema": {"type": "nonsense"}}, "json_schema cannot be followed"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema cannot be followed"),
        ({"stop_token_ids": [4096]}, r"stop_token_ids has token id 4096, .* \[0, 4096\)"),
        ({"logit_bias": {5000: 1}}, "logit_bias has token id 5000"),
        ({"forced_text": [9999]}, "forced_text has token id 9999"),
    ],
)
def test_what_this_model_cannot_do_is_refused_at_the_call(
    tiny: Engine, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.stream(PROMPT, None, SamplingParams(**params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens, got 9 and 8"),
        ({"json_object": True, "forced_text": "a"}, "say different things"),
        ({"json_object": True, "ignore_eos": True}, "say different things"),
        ({"forced_text": "a", "n": 2}, "n must be 1 with forced_text"),
        ({"forced_text": ""}, "at least one token"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    params: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)


# --- what goes wrong


def test_a_request_that_raises_harms_no_mate(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = engine.generate(PROMPT, None, SHORT).token_ids
    decode = type(engine.tokenizer).stream

    class Broken:
        def __init__(self, stream: Any) -> None:
            self.stream, self.count = stream, 0

        def step(self, token: int) -> str:
            self.count += 1
            if self.count == 3:
                raise ValueError("a broken tokenizer")
            text: str = self.stream.step(token)
            return text

    broken = [True]
    monkeypatch.setattr(
        engine.tokenizer,
        "stream",
        lambda: Broken(decode(engine.tokenizer)) if broken.pop() else decode(engine.tokenizer),
        raising=False,
    )
    broken[:] = [False, True, False]
    streams = [engine.stream(PROMPT, None, SHORT) for _ in range(3)]
    assert list(streams[0])[-1].completion.token_ids == want
    with pytest.raises(ValueError, match="a broken tokenizer"):
        list(streams[1])
    assert list(streams[2])[-1].completion.token_ids == want
    idle(engine)


def test_a_step_that_fails_takes_only_the_guilty_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[n, 7, 8, 9] for n in (5, 6, 7)]
    want = [engine.generate(p, None, params).token_ids for p in prompts]
    run = engine.runner.run

    def faulty(chunks: Any, **options: Any) -> Any:
        for chunk in chunks:
            if chunk.sequence.num_computed_tokens == 8 and id(chunk.sequence) == guilty[0]:
                raise RuntimeError("this row is cursed")
            if not guilty:
                guilty.append(id(chunk.sequence))
        return run(chunks, **options)

    guilty: list[int] = []
    monkeypatch.setattr(engine.runner, "run", faulty)
    streams = [engine.stream(p, None, params) for p in prompts]
    with pytest.raises(RuntimeError, match="this row is cursed"):
        list(streams[0])
    for stream, tokens in zip(streams[1:], want[1:], strict=True):
        assert list(stream)[-1].completion.token_ids == tokens
    idle(engine)


@pytest.mark.parametrize("where", ["in its text", "in the step"])
def test_a_choice_that_fails_ends_the_others_of_its_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In the same step, before they have their token; a mate goes on."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    want = engine.generate(PROMPT, "k1", params).token_ids
    append, run = Sequence.append, engine.runner.run

    def faulty_append(sequence: Sequence, *arguments: Any) -> Any:
        if sequence.request.params.n == 3 and sequence.num_output_tokens == 20:
            raise ValueError("cursed")
        return append(sequence, *arguments)

    def faulty_run(chunks: Any, **options: Any) -> Any:
        cursed = [c.sequence for c in chunks if c.sequence.request.params.n == 3]
        if any(sequence.num_computed_tokens > len(PROMPT) + 20 for sequence in cursed):
            raise ValueError("cursed")
        return run(chunks, **options)

    if where == "in its text":
        monkeypatch.setattr(Sequence, "append", faulty_append)
    else:
        monkeypatch.setattr(engine.runner, "run", faulty_run)
    three = engine.stream(
        PROMPT, None, SamplingParams(max_tokens=40, ignore_eos=True, n=3, temperature=1.0)
    )
    next(three)
    mate = engine.stream(PROMPT, "k1", params)
    with pytest.raises(ValueError, match="cursed"):
        list(three)
    assert list(mate)[-1].completion.token_ids == want
    idle(engine)


def test_a_defect_of_the_engine_is_told_to_everybody(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_pretrained(tiny_folder)
    core = engine._running_core()
    monkeypatch.setattr(core._scheduler, "schedule", lambda: 1 / 0)
    with pytest.raises(EngineError, match="the engine failed: ZeroDivisionError"):
        engine.generate(PROMPT, None, SHORT)
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.generate(PROMPT, None, SHORT)
    engine.close()


def test_cancelled_requests_leave_nothing(engine: Engine) -> None:
    streams = [engine.stream(PROMPT, None, LONG) for _ in range(8)]
    for stream in streams[:4]:
        next(stream)
    assert engine.stats().used_blocks > 0
    with held(engine):
        before = engine.stats().steps
        for stream in streams:
            stream.close()
    assert list(streams[0]) == []
    idle(engine)
    assert engine.stats().steps <= before + 1


def test_a_dropped_iterator_ends_its_request(engine: Engine) -> None:
    stream = engine.stream(PROMPT, None, LONG)
    next(stream)
    with held(engine):
        before = engine.stats().steps
        never_started = engine.stream(PROMPT, None, LONG)
        del stream, never_started
        gc.collect()
    idle(engine)
    assert engine.stats().steps <= before + 1


def test_closing_a_stream_wakes_who_waits_for_it(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as pool, held(engine):
        stream = engine.stream(PROMPT, None, LONG)
        waiting = pool.submit(list, stream)
        time.sleep(0.05)
        stream.close()
        assert waiting.result(timeout=20) == []
    idle(engine)


def test_a_list_that_fails_leaves_nothing_running(engine: Engine) -> None:
    """Its requests are checked before the first one runs; what fails later ends the others."""
    bad = SamplingParams(json_schema={"type": "nonsense"})
    before = engine.stats().steps
    with pytest.raises(RequestError, match="json_schema cannot be followed"):
        engine.generate([PROMPT] * 3, None, [LONG, LONG, bad])
    with pytest.raises(RequestError, match="json_schema cannot be followed"):
        asyncio.run(engine.agenerate([PROMPT] * 3, None, [LONG, LONG, bad]))
    assert engine.stats().steps == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_list_of_which_one_raises_ends_the_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    append = Sequence.append

    def faulty(sequence: Sequence, *arguments: Any) -> Any:
        if sequence.num_output_tokens == 3 and sequence.request.params.max_tokens == 6:
            raise ValueError("cursed")
        return append(sequence, *arguments)

    monkeypatch.setattr(Sequence, "append", faulty)
    request: Any = ([PROMPT] * 3, None, [SHORT, LONG, LONG])
    with pytest.raises(ValueError, match="cursed"):
        asyncio.run(engine.agenerate(*request)) if asynchronous else engine.generate(*request)
    idle(engine)
    assert engine.stats().steps < 400


def test_a_dropped_engine_ends_its_thread(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(tiny_folder)
    engine.generate(PROMPT, None, SHORT)
    thread = engine._running_core()._thread
    del engine
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_python_ends_while_requests_run(tiny_folder: Path) -> None:
    """The thread is inside native code then, which Python's end would tear apart."""
    code = f"""
from elastic_moe import Engine, SamplingParams
engine = Engine.from_pretrained({str(tiny_folder)!r})
params = SamplingParams(max_tokens=600, ignore_eos=True)
streams = [engine.stream([5, 6], None, params) for _ in range(40)]
next(streams[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_keeps_its_engine(tiny_folder: Path) -> None:
    stream = Engine.from_pretrained(tiny_folder).stream(PROMPT, None, SHORT)
    gc.collect()
    assert len(list(stream)) == 6


def test_a_full_queue_refuses_and_recovers(tiny_folder: Path) -> None:
    with Engine.from_pretrained(tiny_folder, max_queue=3, max_num_seqs=1) as engine:
        with held(engine):
            streams = [engine.stream(PROMPT, None, LONG) for _ in range(3)]
            with pytest.raises(
                QueueFullError, match="3 requests are unfinished, and max_queue is 3"
            ):
                engine.stream(PROMPT)
            for stream in streams:
                stream.close()
        idle(engine)
        # A list is fed as the queue takes it.
        assert len(engine.generate([PROMPT] * 20, None, SHORT)) == 20


def test_what_the_cache_can_never_hold_is_refused_with_both_numbers(tiny_folder: Path) -> None:
    block = Engine.from_pretrained(tiny_folder).runner.block_bytes
    with Engine.from_pretrained(tiny_folder, kv_cache_bytes=20 * block) as engine:
        with pytest.raises(
            RequestError, match=r"100 tokens in 6 layers take 42 blocks .* the cache has 20"
        ):
            engine.stream(PROMPT, None, SamplingParams(max_tokens=60))
        # Fewer layers fit.
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        assert engine.generate(PROMPT, "L2", params).usage.completion_tokens == 60


def test_requests_that_need_more_than_there_is_take_turns(tiny_folder: Path) -> None:
    block = Engine.from_pretrained(tiny_folder).runner.block_bytes
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with Engine.from_pretrained(tiny_folder) as roomy:
        want = [
            c.token_ids for c in roomy.generate([[n, *PROMPT] for n in range(5, 10)], None, params)
        ]
    with Engine.from_pretrained(tiny_folder, kv_cache_bytes=60 * block) as engine:
        prompts = [[n, *PROMPT] for n in range(5, 10)]
        assert [c.token_ids for c in engine.generate(prompts, None, params)] == want
        assert engine.stats().preemptions > 0
        idle(engine)


def test_prompt_logprobs_come_once_though_their_prompt_is_read_twice(tiny_folder: Path) -> None:
    block = Engine.from_pretrained(tiny_folder).runner.block_bytes
    params = SamplingParams(max_tokens=60, ignore_eos=True, prompt_logprobs=1)
    with Engine.from_pretrained(tiny_folder, kv_cache_bytes=60 * block) as engine:
        want = engine.generate([9, *PROMPT], None, params).prompt_logprobs
        done = engine.generate([[9, *PROMPT]] * 5, None, params)
        assert engine.stats().preemptions > 0
        assert [c.prompt_logprobs for c in done] == [want] * 5


def test_closing_lets_requests_end_within_its_time(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(tiny_folder)
    streams = [engine.stream(PROMPT, None, SHORT) for _ in range(5)]
    engine.close(drain_seconds=60)
    assert [len(list(stream)) for stream in streams] == [6] * 5
    with pytest.raises(EngineError, match="closed"):
        engine.stream(PROMPT)


@pytest.mark.parametrize("seconds", [None, -1, float("nan"), float("inf"), "5"])
def test_a_time_to_drain_that_is_none_is_refused_and_nothing_is_closed(
    engine: Engine, seconds: Any
) -> None:
    with pytest.raises(EngineError, match="drain_seconds must be a finite number"):
        engine.close(seconds)
    assert engine.generate(PROMPT, None, SHORT).usage.completion_tokens == 6


def test_a_second_close_may_be_in_more_of_a_hurry(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(tiny_folder, max_num_seqs=1)
    streams = [engine.stream(PROMPT, None, LONG) for _ in range(100)]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(engine.close, 600)
        time.sleep(0.05)
        start = time.monotonic()
        engine.close()
        slow.result(timeout=20)
    assert time.monotonic() - start < 20
    with pytest.raises(EngineError, match="closed before"):
        list(streams[-1])


def test_an_observer_may_neither_call_nor_break_the_engine(tiny_folder: Path) -> None:
    refused: list[str] = []

    def on_step(_: StepRecord) -> None:
        try:
            engine.score([1])
        except EngineError as error:
            refused.append(str(error))
        raise ValueError("an observer's own fault")

    engine = Engine.from_pretrained(tiny_folder, on_step=on_step)
    with pytest.warns(RuntimeWarning, match="on_step raised ValueError: an observer's own"):
        assert engine.generate(PROMPT, None, SHORT).usage.completion_tokens == 6
    engine.close()
    assert len(refused) == 1
    assert "on_step runs on the engine's thread" in refused[0]


def _read_in_child(stream: Any, queue: Any) -> None:
    try:
        next(stream)
    except EngineError as error:
        queue.put(str(error))
    stream.close()
    queue.put("closed")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_stream_cannot_be_read_after_a_fork(engine: Engine) -> None:
    stream = engine.stream(PROMPT, None, LONG)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(stream, queue))
    child.start()
    assert "after a fork" in queue.get(timeout=60)
    assert queue.get(timeout=60) == "closed"
    child.join()
    assert len(next(stream).token_ids) == 1
    stream.close()


def test_closing_ends_what_takes_longer(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(tiny_folder, max_num_seqs=1)
    streams = [engine.stream(PROMPT, None, LONG) for _ in range(200)]
    start = time.monotonic()
    engine.close(drain_seconds=0.2)
    assert time.monotonic() - start < 10
    with pytest.raises(EngineError, match="closed before the request had ended"):
        list(streams[-1])


def test_async_streams_share_steps_and_can_be_dropped(tiny_folder: Path) -> None:
    steps: list[StepRecord] = []
    engine = Engine.from_pretrained(tiny_folder, on_step=steps.append)

    async def read(name: str) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        async for delta in engine.astream(PROMPT, name, SamplingParams(max_tokens=30)):
            tokens += delta.token_ids
        return tokens

    async def drop() -> None:
        deltas = engine.astream(PROMPT, None, LONG)
        await anext(deltas)
        await deltas.aclose()

    async def both() -> list[Any]:
        return await asyncio.gather(read("full"), read("k1"), drop(), engine.agenerate(PROMPT))

    full, k1, _, done = asyncio.run(both())
    params = SamplingParams(max_tokens=30)
    assert full == engine.generate(PROMPT, None, params).token_ids
    assert k1 == engine.generate(PROMPT, "k1", params).token_ids
    assert done.token_ids == engine.generate(PROMPT).token_ids
    idle(engine)
    assert max(len(step.parts) for step in steps) > 1
    dropped = [step for step in steps if any(number == 2 for number, _, _ in step.parts)]
    assert len(dropped) < 300
    engine.close()


def test_a_cancelled_task_ends_its_request(engine: Engine) -> None:
    async def cancelled() -> None:
        for prompts in (PROMPT, [PROMPT] * 3):
            with held(engine):
                task = asyncio.create_task(engine.agenerate(prompts, None, LONG))
                while not engine.stats().unfinished:
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(cancelled())
    idle(engine)
    assert engine.stats().steps == 0


def test_scoring_goes_on_beside_generation(engine: Engine) -> None:
    want = engine.score(PROMPT, "k2")
    with ThreadPoolExecutor(2) as pool, held(engine):
        stream = engine.stream(PROMPT, None, LONG)
        scored = pool.submit(engine.score, PROMPT, "k2")
        ranked = pool.submit(engine.rank_channels, "some text to rank by")
        time.sleep(0.05)
    assert np.array_equal(scored.result(), want)
    with pytest.raises(EngineError, match="requests are running"):
        ranked.result()
    stream.close()


def test_a_step_comes_between_two_calls(engine: Engine) -> None:
    """Callers that never stop calling do not hold up who writes."""
    core, stop = engine._running_core(), threading.Event()

    def call() -> None:
        while not stop.is_set():
            core.call(lambda: time.sleep(0.002))

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(call)
        try:
            start = time.monotonic()
            assert engine.generate(PROMPT, None, SHORT).usage.completion_tokens == 6
            assert time.monotonic() - start < 5
        finally:
            stop.set()


def test_calls_from_many_threads_at_once(engine: Engine) -> None:
    want = engine.generate(PROMPT, "k1", SHORT).token_ids

    def hammer() -> None:
        for _ in range(5):
            assert engine.generate(PROMPT, "k1", SHORT).token_ids == want
            stream = engine.stream(PROMPT, "L2", LONG)
            next(stream)
            stream.close()

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(hammer) for _ in range(6)]:
            future.result()
    idle(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seqs": 3}, "there is no option 'max_seqs'. There are: max_num_seqs"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
        ({"max_queue": 1.5}, "max_queue must be an integer of at least 1, got 1.5"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes must be an integer of at least 1"),
        ({"on_step": 5}, "on_step must be callable, got 5"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "at most max_num_batched_tokens"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine.from_pretrained("elastic-mini", **options)


def test_kv_of_12_layers_are_a_quarter_of_48(mini: Engine) -> None:
    core, used = mini._running_core(), []
    for first, name in ((20, "full"), (60, "L12")):  # nothing in common
        # 33 tokens, then up to 15: three pages from the first step to the last.
        params = SamplingParams(max_tokens=15, ignore_eos=True)
        stream = mini.stream(list(range(first, first + 33)), name, params)
        next(stream)
        seen = core.call(lambda: (mini.stats().used_blocks, len(core._scheduler.running)))
        while seen[1] == 0:  # it had ended by then
            first += 1
            stream = mini.stream(list(range(first, first + 33)), name, params)
            next(stream)
            seen = core.call(lambda: (mini.stats().used_blocks, len(core._scheduler.running)))
        used.append(seen[0])
        list(stream)
    assert used == [3 * 48, 3 * 12]
