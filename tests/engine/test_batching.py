"""One batch, many sub-networks: everybody gets what they would get alone.

The oracle is an engine that runs one sequence at a time and remembers nothing.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elastic_moe_kernels import native

from elastic_moe import Completion, Engine, SamplingParams
from elastic_moe.engine.running import batch as flat_batch
from elastic_moe.engine.stats import StepRecord
from elastic_moe.routing import Subnet
from tests.engine.holding import held
from tests.engine.running.test_invariance import random_subnet

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed")

COUNT = 32
Result = tuple[tuple[int, ...], Any, str, str]


def result(completion: Completion) -> Result:
    """All that must be the same, to the bit."""
    return (
        completion.token_ids,
        completion.logprobs,
        completion.text,
        completion.finish_reason,
        tuple((c.token_ids, c.logprobs) for c in completion.choices),
        completion.routing.fingerprint,
        completion.prompt_logprobs,
    )


@cache
def engine_of(folder: Path, dtype: str, kind: str) -> Engine:
    options: dict[str, Any] = {
        "solo": {"max_num_seqs": 1, "enable_prefix_caching": False},
        "shared": {"max_num_seqs": 33, "max_num_batched_tokens": 64, "on_step": STEPS.append},
        # 6 layers, up to 70 tokens: the longest takes 30 blocks.
        "small": {"max_num_seqs": 16, "max_num_batched_tokens": 48, "kv_cache_bytes": 0},
    }[kind]
    if kind == "small":
        block = engine_of(folder, dtype, "solo").runner.block_bytes
        options["kv_cache_bytes"] = 44 * block
    return Engine.from_pretrained(folder, backend="cpu", dtype=dtype, **options)


STEPS: list[StepRecord] = []


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def requests(shape: Any, count: int = COUNT) -> list[tuple[list[int], Subnet, SamplingParams]]:
    """Prompts with common beginnings, sub-networks of all kinds, all ways to choose tokens."""
    rng = np.random.default_rng(5)
    draw = random.Random(5)
    base = rng.integers(5, 4096, 60).tolist()
    made = []
    for number in range(count):
        prompt = base[: draw.randint(1, 50)] + rng.integers(5, 4096, draw.randint(1, 8)).tolist()
        params = SamplingParams(
            max_tokens=draw.randint(3, 12),
            ignore_eos=draw.random() < 0.7,
            temperature=draw.choice([0.0, 0.7, 3.0]),
            seed=number,
            logprobs=draw.choice([None, 0, 3]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 40]),
            min_p=draw.choice([0.0, 0.01]),
            frequency_penalty=draw.choice([0.0, 0.5]),
            repetition_penalty=draw.choice([1.0, 1.2]),
            n=draw.choice([1, 1, 1, 3]),
            prompt_logprobs=draw.choice([None, None, None, 2]),
        )
        made.append((prompt, random_subnet(shape, rng), params))
    return made


def solo(folder: Path, dtype: str) -> list[Result]:
    engine = engine_of(folder, dtype, "solo")
    return [result(engine.generate(*request)) for request in requests(engine.shape)]


solo = cache(solo)


def together(engine: Engine) -> list[Result]:
    """All requests at once, from as many threads."""
    found: dict[int, Result] = {}

    def ask(number: int, request: Any) -> None:
        found[number] = result(engine.generate(*request))

    threads = [
        threading.Thread(target=ask, args=item) for item in enumerate(requests(engine.shape))
    ]
    with held(engine):
        for thread in threads:
            thread.start()
        while engine.stats().unfinished < len(threads):
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(threads))]


def at_once(engine: Engine, prompt: list[int], names: list[str], params: Any) -> list[Completion]:
    """The prompt under each of these sub-networks, in shared steps."""
    with held(engine):
        streams = [engine.stream(prompt, name, params) for name in names]
    done = [list(stream)[-1].completion for stream in streams]
    return [completion for completion in done if completion is not None]


def test_32_requests_with_32_subnetworks_get_what_each_gets_alone(
    tiny_folder: Path, dtype: str
) -> None:
    want = solo(tiny_folder, dtype)
    engine = engine_of(tiny_folder, dtype, "shared")
    asked = requests(engine.shape)
    assert len({subnet.fingerprint for _, subnet, _ in asked}) == COUNT
    STEPS.clear()
    got = together(engine)
    shared = max(len({number for number, _, _ in step.parts}) for step in STEPS)
    assert shared > 16, "most of them must have shared steps"
    mixed = [s for s in STEPS if len({n for _, _, n in s.parts}) > 1]
    assert len(mixed) > 3, "prompts and single tokens must have shared steps"
    for request, mine, alone in zip(asked, got, want, strict=True):
        assert mine == alone, request[1]
    engine.check_integrity()
    # Again, with everything in the prefix cache.
    assert together(engine) == want
    engine.check_integrity()
    assert engine.stats().used_blocks == 0


def test_a_cache_that_preempts_changes_nothing(tiny_folder: Path, dtype: str) -> None:
    engine = engine_of(tiny_folder, dtype, "small")
    before = engine.stats().preemptions
    for _ in range(3):
        done = engine.generate(*map(list, zip(*requests(engine.shape), strict=True)))
        assert [result(completion) for completion in done] == solo(tiny_folder, dtype)
    assert engine.stats().preemptions > before
    engine.check_integrity()


def test_the_comparison_sees_two_rows_that_exchange_their_subnetworks(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flatten = flat_batch.flatten

    def exchanged(chunks: Any, sizes: list[int]) -> Any:
        arrays = flatten(chunks, sizes)
        if len(chunks) > 1:
            first, second = (chunk.sequence.subnet for chunk in chunks[:2])
            if first.active_layers == second.active_layers:
                rows = [chunk.sequence.subnet_row for chunk in chunks]
                arrays.subnets[:] = np.repeat([rows[1], rows[0], *rows[2:]], sizes)
        return arrays

    monkeypatch.setattr("elastic_moe.engine.running.native.flatten", exchanged)
    engine = Engine.from_pretrained(tiny_folder, backend="cpu", dtype="float32")
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)
    alone = [engine.generate([7, 8, 9, 10], name, params) for name in ("k1", "k2")]
    both = at_once(engine, [7, 8, 9, 10], ["k1", "k2"], params)
    assert [result(c) for c in both] != [result(c) for c in alone]


def test_a_seed_gives_the_same_tokens_whatever_is_cached(tiny_folder: Path, dtype: str) -> None:
    engine = engine_of(tiny_folder, dtype, "shared")
    params = SamplingParams(max_tokens=20, temperature=1.3, seed=9, ignore_eos=True, n=4)
    prompt = list(range(10, 60))
    first = engine.generate(prompt, "k2", params)
    again = engine.generate(prompt, "k2", params)
    assert again.usage.cached_tokens == 48
    assert result(first) == result(again)
    assert len({choice.token_ids for choice in first.choices}) == 4
    other = engine.generate(prompt, "k2", replace(params, seed=10))
    assert other.token_ids != first.token_ids
    single = engine.generate(prompt, "k2", replace(params, n=1))
    assert single.token_ids == first.token_ids


@pytest.mark.parametrize(
    ("then", "cached"), [("full", 48), ("L3", 48), ("L1-k1", 48), ("k2", 0), ("w2", 0), ("p4", 0)]
)
def test_a_prefix_is_used_by_whom_it_fits_and_changes_nothing(
    tiny_folder: Path, dtype: str, then: str, cached: int
) -> None:
    engine = Engine.from_pretrained(tiny_folder, backend="cpu", dtype=dtype)
    alone = engine_of(tiny_folder, dtype, "solo")
    prompt = list(range(10, 70))
    params = SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True)
    engine.generate(prompt, None, params)
    asked = [*prompt[:50], 5, 6]
    got, want = (e.generate(asked, then, params) for e in (engine, alone))
    assert got.usage.cached_tokens == cached
    assert result(got) == result(want)


def test_a_shallow_prefix_does_not_serve_a_deeper_network(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(tiny_folder, backend="cpu")
    params = SamplingParams(max_tokens=2)
    prompt = list(range(10, 70))
    engine.generate(prompt, "L3", params)
    assert engine.generate(prompt, None, params).usage.cached_tokens == 0
    assert engine.generate(prompt, "L2", params).usage.cached_tokens == 48


def test_each_request_is_told_the_experts_that_it_ran(tiny_folder: Path) -> None:
    """In one batch: a threshold drops some of one's experts, and none of another's."""
    steps: list[StepRecord] = []
    engine = Engine.from_pretrained(
        tiny_folder, backend="cpu", enable_prefix_caching=False, on_step=steps.append
    )
    names = ["full", "t0.9", "k1", "L3-t0.5", "k2-t1"]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    want = [engine.generate([9, 8, 7, 6], name, params).routing for name in names]
    steps.clear()
    got = [c.routing for c in at_once(engine, [9, 8, 7, 6], names, params)]
    assert got == want
    assert max(len(step.parts) for step in steps) == 5
    assert want[0].mean_experts == engine.shape.max_top_k
    assert [routing.mean_experts for routing in (want[2], want[4])] == [1.0, 1.0]
    assert 1 < want[1].mean_experts < 3


@pytest.mark.needs_torch
def test_the_reference_serves_the_same_requests(tiny_folder: Path) -> None:
    """Its own logits, so nearly the same ones: greedy tokens, with preemption and prefixes."""
    block = Engine.from_pretrained(tiny_folder, backend="reference").runner.block_bytes
    engine = Engine.from_pretrained(
        tiny_folder,
        backend="reference",
        dtype="float32",
        kv_cache_bytes=2 * 40 * block,  # the block above is of the file's bf16
        max_num_batched_tokens=20,
        max_num_seqs=6,
    )
    native = engine_of(tiny_folder, "float32", "solo")
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [[n, *range(20, 45)] for n in (7, 7, 8, 9)]
    names = ["full", "L3", "k1", "w2-t0.5"]
    got = engine.generate(prompts, names, params)
    want = native.generate(prompts, names, params)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert engine.stats().preemptions > 0
    engine.check_integrity()
    engine.generate(prompts[0], None, params)
    assert engine.generate(prompts[0], "L3", params).usage.cached_tokens == 16
