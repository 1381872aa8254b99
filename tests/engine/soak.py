"""Random requests through a cache that is far too small: python -m tests.engine.soak, `make soak`.

Requests of all kinds come from several threads: texts that begin alike, any sub-network, any way to
choose tokens, JSON, forced texts, several choices; some are dropped half-way, some are wrong, some
raise in the middle. In the end no sequence, block, job or thread may be left, and every answer must
be, to the bit, what an engine gives that runs one request at a time and remembers nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from elastic_moe import Completion, Engine, SamplingParams
from elastic_moe.engine.request import Sequence
from elastic_moe.errors import ElasticMoEError
from elastic_moe.routing import Subnet
from tests.conftest import make_tiny_folder
from tests.engine.running.test_invariance import random_subnet

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CURSED = 7  # logprobs: whose generation has so many raises in the middle
BLOCKS = 60


@dataclass(frozen=True)
class Request:
    """What is asked, and how it is to end: 'whole', 'drop', 'wrong' or 'raise'."""

    prompt: list[int]
    subnet: Subnet
    params: SamplingParams
    fate: str


def make_requests(shape: Any, count: int, seed: int) -> list[Request]:
    """The same for the same seed."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    bases = [rng.integers(5, 4096, 90).tolist() for _ in range(4)]
    subnets = [random_subnet(shape, rng) for _ in range(40)]
    made = []
    for number in range(count):
        prompt = draw.choice(bases)[: draw.randint(1, 80)]
        prompt = prompt + rng.integers(5, 4096, draw.randint(0, 6)).tolist()
        fate = draw.choices(["whole", "drop", "wrong", "raise"], [75, 15, 5, 5])[0]
        options: dict[str, Any] = {
            "max_tokens": draw.randint(1, 24),
            "temperature": draw.choice([0.0, 0.0, 0.8, 2.0]),
            "seed": number,
            "top_p": draw.choice([1.0, 0.8]),
            "top_k": draw.choice([0, 0, 20]),
            "min_p": draw.choice([0.0, 0.02]),
            "presence_penalty": draw.choice([0.0, 0.4]),
            "repetition_penalty": draw.choice([1.0, 1.3]),
            "logprobs": draw.choice([None, 0, 2]),
            "ignore_eos": draw.random() < 0.5,
        }
        kind = draw.random()
        if kind < 0.1:
            options |= {"json_schema": SCHEMA, "ignore_eos": False, "max_tokens": 30}
        elif kind < 0.2:
            options["forced_text"] = rng.integers(5, 4096, draw.randint(1, 20)).tolist()
        elif kind < 0.3:
            options["n"] = draw.randint(2, 4)
        elif kind < 0.35:
            options["prompt_logprobs"] = draw.choice([0, 3])
        if fate == "raise":
            options |= {"logprobs": CURSED, "max_tokens": 12, "ignore_eos": True}
            options |= {"json_schema": None, "forced_text": None}
        if fate == "wrong":
            options |= draw.choice(
                [{"stop_token_ids": [10**6]}, {"max_tokens": 10**5}, {"logit_bias": {9999: 1}}]
            )
        made.append(Request(prompt, draw.choice(subnets), SamplingParams(**options), fate))
    return made


def answer(completion: Completion) -> Any:
    """All that must be the same."""
    return completion.choices, completion.prompt_logprobs, completion.finish_reason


def cursed_append(append: Any) -> Any:
    """`Sequence.append` that raises in the middle of some requests."""

    def faulty(sequence: Sequence, *arguments: Any) -> Any:
        if sequence.request.params.logprobs == CURSED and sequence.num_output_tokens == 5:
            raise RuntimeError("cursed")
        return append(sequence, *arguments)

    return faulty


def ask(engine: Engine, request: Request) -> Any:
    """Its answer, or how it ended."""
    try:
        stream = engine.stream(request.prompt, request.subnet, request.params)
        for count, delta in enumerate(stream):
            if request.fate == "drop" and count == request.params.max_tokens // 2:
                stream.close()
                return "dropped"
            if delta.completion is not None:
                return answer(delta.completion)
    except ElasticMoEError:
        return "refused"
    except RuntimeError as error:
        return str(error)
    return "nothing"


def run(folder: Path, count: int, seed: int, dtype: str, threads: int = 12) -> dict[str, Any]:
    """Drive the engine, then compare.

    Raises:
        AssertionError: something is left over, or an answer differs.
    """
    before = threading.active_count()
    solo = Engine.from_pretrained(
        folder, backend="cpu", dtype=dtype, max_num_seqs=1, enable_prefix_caching=False
    )
    engine = Engine.from_pretrained(
        folder,
        backend="cpu",
        dtype=dtype,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        kv_cache_bytes=BLOCKS * solo.runner.block_bytes,
    )
    requests = make_requests(engine.shape, count, seed)
    started = time.monotonic()
    with mock.patch.object(Sequence, "append", cursed_append(Sequence.append)):
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda request: ask(engine, request), requests))
        seconds = time.monotonic() - started
        while engine.stats().unfinished:
            time.sleep(0.01)
        engine.check_integrity()
        stats = engine.stats()
        assert (stats.used_blocks, stats.running, stats.waiting) == (0, 0, 0), stats
        for number, (request, got) in enumerate(zip(requests, found, strict=True)):
            if got != "dropped":
                assert got == ask(solo, request), f"request {number}: {request}"
    engine.close()
    solo.close()
    assert threading.active_count() <= before
    ends = Counter(got if isinstance(got, str) else "answered" for got in found)
    return {
        "requests": count,
        "seconds": round(seconds, 1),
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "evicted_pages": stats.evicted_pages,
        "dtype": dtype,
        **ends,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_tiny_folder(Path(temporary) / "tiny")
        for dtype in ("bfloat16", "float32"):
            sys.stdout.write(f"{run(folder, args.requests, args.seed, dtype)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
