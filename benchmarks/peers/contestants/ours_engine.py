"""elastic-moe's engine: ours_engine.py FOLDER THREADS. Runs under .venv.

Requests come in as a caller's would, and every step of the model is watched from inside: when it
began and ended, what it touched, how long the native call took.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from elastic_moe_kernels.step import Counters

from benchmarks.peers.contestants.timed_native import TimedNative
from benchmarks.peers.contestants.worker import Ids, serve
from elastic_moe.engine import Engine, SamplingParams
from elastic_moe.engine.config import EngineConfig
from elastic_moe.engine.running.loading import load_runner
from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.lab.provenance import describe_commit, describe_machine, describe_versions
from elastic_moe.model.text.tokenizer import Tokenizer


class Step(NamedTuple):
    """A step that the engine ran: its start, chunks, native seconds and counters."""

    start: float
    chunks: Sequence[Any]
    native_seconds: float
    counters: Counters

    @property
    def tokens(self) -> list[int]:
        """New tokens of each sequence in this step."""
        return [len(chunk.token_ids) for chunk in self.chunks]


class Served:
    """An engine on a checkpoint without a tokenizer, and the steps that it ran."""

    def __init__(self, folder: Path, sequences: int, threads: int) -> None:
        runner = load_runner(folder, backend="cpu", dtype="bfloat16")
        if not isinstance(runner, NativeRunner):
            raise SystemExit("the C++ kernels do not run this checkpoint")
        self.runner = runner
        self.level = runner.model.level
        self._timer = runner.model.native = TimedNative(runner.model.native)
        self._run = runner.run
        runner.run = self._watched  # type: ignore[method-assign]
        self.steps: list[Step] = []
        with tempfile.TemporaryDirectory() as words:
            make_tokenizer(Path(words), runner.config.vocab_size)
            self._tokenizer = Tokenizer(Path(words))
        engine_config = EngineConfig(
            max_num_seqs=sequences, kv_cache_bytes=2 << 30, num_threads=threads
        )
        self.engine = Engine(runner, self._tokenizer, folder, engine_config)

    def _watched(self, chunks: Sequence[Any], **options: Any) -> Any:
        # As little as possible: what this takes counts as the engine's.
        before, start = self._timer.seconds, time.perf_counter()
        out = self._run(chunks, **options)
        if out.counters is None:
            raise SystemExit("the step counted nothing")
        self.steps.append(Step(start, chunks, self._timer.seconds - before, out.counters))
        return out

    def decode(self, contexts: Ids, new_tokens: int, routings: Sequence[str]) -> dict[str, Any]:
        """Steps in which all sequences write a token: period, native part, bytes."""
        self.steps.clear()
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        streams = [
            self.engine.stream(ids, name, params)
            for ids, name in zip(contexts, routings, strict=True)
        ]
        for stream in streams:
            for _ in stream:
                pass
        together = [1] * len(contexts)
        pairs = [
            (step, after)
            for step, after in zip(self.steps, self.steps[1:], strict=False)
            if step.tokens == together == after.tokens
        ][2:]  # the first ones warm up
        if len(pairs) < 4:
            raise SystemExit(f"only {len(pairs)} steps were shared by all {len(contexts)}")
        period = [after.start - step.start for step, after in pairs]
        outside = [p - step.native_seconds for p, (step, _) in zip(period, pairs, strict=True)]
        best = min(range(len(pairs)), key=period.__getitem__)
        counters = pairs[best][0].counters
        return {
            "seconds": period[best],
            "touched_bytes": counters.weight_bytes + counters.kv_bytes,
            "flops": counters.flops,
            "median_seconds": statistics.median(period),
            "outside_seconds": statistics.median(outside),
        }

    def prefix(self, ids: Sequence[int], routings: Sequence[str]) -> dict[str, float]:
        """Seconds to the first token of these ids: nothing cached, then all of them."""
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        core = self.engine._running_core()
        found: dict[str, float] = {}
        for name in routings:
            core.call(core.forget_prefixes)
            cold = self.engine.generate(list(ids), name, params).usage
            core.call(core.forget_prefixes)
            self.engine.generate(list(ids), routings[0], params)
            warm = self.engine.generate(list(ids), name, params).usage
            if cold.cached_tokens or not warm.cached_tokens:
                raise SystemExit("the prefix cache was not as it should be")
            found[f"{name} cold"], found[f"{name} warm"] = cold.ttft_seconds, warm.ttft_seconds
        return found

    def load(self, contexts: Ids, new_tokens: int) -> dict[str, float]:
        """All requests at once: tokens per second, times to the first and per further token."""
        core = self.engine._running_core()
        core.call(core.forget_prefixes)
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        done = self.engine.generate([list(ids) for ids in contexts], None, params)
        seconds = time.perf_counter() - start
        return {
            "tokens_per_second": len(contexts) * new_tokens / seconds,
            "ttft_seconds": statistics.median(c.usage.ttft_seconds for c in done),
            "tpot_seconds": statistics.median(c.usage.tpot_seconds for c in done),
        }


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer with one word per id, for a checkpoint that has none."""
    words = {f"w{i}": i for i in range(vocab_size)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    served = Served(folder, 64, threads)

    def logits(contexts: Ids, tokens: Ids, path: str) -> None:
        """As a contestant's: through scoring, which is teacher-forced."""
        every = [
            [*ids, *step] for ids, step in zip(contexts, zip(*tokens, strict=True), strict=True)
        ]
        rows = [served.engine.score(ids)[len(contexts[0]) - 1 :] for ids in every]
        np.save(path, np.stack(rows, axis=1))

    serve(
        {
            "decode": served.decode,
            "prefix": served.prefix,
            "load": served.load,
            "logits": logits,
            "identify": lambda: {
                "backend": served.runner.backend,
                "level": served.level,
                "machine": describe_machine(threads),
                "commit": describe_commit(),
            },
        },
        describe_versions(),
    )


main()
