"""elastic-moe: ours_model.py FOLDER THREADS BACKEND [KERNEL]. Runs under .venv.

KERNEL names what runs twice, to see that the bars notice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.contestants.slowdown import SLOWER, TwiceTheExperts
from benchmarks.peers.contestants.timed_native import TimedNative
from benchmarks.peers.contestants.worker import Ids, model_handlers, serve
from elastic_moe.config import resolve_routing
from elastic_moe.engine import Engine, SamplingParams
from elastic_moe.engine.config import EngineConfig
from elastic_moe.engine.running.loading import Backend, load_runner
from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.lab.bench.batch import Batch
from elastic_moe.lab.provenance import describe_commit, describe_machine, describe_versions
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.routing import Subnet


class Ours:
    """Sequences on a runner, under the sub-network chosen last."""

    def __init__(self, folder: Path, backend: Backend, slow: str | None, threads: int) -> None:
        self.folder = folder
        self.runner = load_runner(folder, backend=backend, dtype="bfloat16")
        self.runner.set_threads(threads)
        if slow is not None and isinstance(self.runner, NativeRunner):
            twice = TwiceTheExperts(self.runner.model, load_model(folder, dtype="bfloat16"))
            self.runner.model.prepare = twice  # type: ignore[method-assign,assignment]
        self.batch = Batch(self.runner)
        self.subnet = Subnet.full(self.runner.config.shape)

    def start(self, contexts: Ids, keep: bool) -> NDArray[np.float32]:  # noqa: ARG002  (always keeps)
        return self.batch.start(contexts, self.subnet)

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self.batch.decode(ids)

    def work(self) -> dict[str, Any]:
        """Bytes, FLOPs and experts of the last call; {} where the backend does not count."""
        work = self.batch.work()
        if work is None:
            return {}
        return {
            "touched_bytes": work.touched_bytes,
            "weight_bytes": work.weight_bytes,
            "flops": work.flops,
            "mean_experts": work.mean_experts,
        }

    def choose(self, routing: str) -> str:
        """Run this sub-network from now on; its canonical name."""
        self.subnet = resolve_routing(self.runner.config.shape, routing)
        return self.subnet.name

    def seconds_outside(self, contexts: Ids, steps: int) -> float:
        """Median seconds per token outside the native call, all of the engine included."""
        if not isinstance(self.runner, NativeRunner):
            raise SystemExit("the reference has no native call")
        config = EngineConfig(num_threads=self.runner.threads)
        engine = Engine(self.runner, Tokenizer(self.folder), self.folder, config)
        packed = self.runner.model
        sampling = SamplingParams(max_tokens=steps + 2, temperature=0.0, ignore_eos=True)
        deltas = engine.stream(contexts[0], None, sampling)
        next(deltas), next(deltas)  # the prompt, and a warm-up
        timer = packed.native = TimedNative(packed.native)
        outside: list[float] = []
        try:
            for _ in range(steps - 1):  # the last one ends the text
                inside, start = timer.seconds, time.perf_counter()
                next(deltas)
                outside.append(time.perf_counter() - start - (timer.seconds - inside))
        finally:
            packed.native = timer.native
        return statistics.median(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("backend", choices=("cpu", "reference"))
    parser.add_argument("slow", nargs="?", choices=SLOWER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = Ours(args.folder, args.backend, args.slow, args.threads)
    handlers = model_handlers(ours)

    def under(routing: str, wanted: str, **request: Any) -> Any:
        """Another request, under this sub-network."""
        name = ours.choose(routing)
        try:
            return {**handlers[wanted](**request), "name": name}
        finally:
            ours.choose("full")

    def time_outside(contexts: Ids, tokens: Ids) -> dict[str, Any]:
        return {"seconds": ours.seconds_outside(contexts, len(tokens))}

    def identify() -> dict[str, Any]:
        return {
            "backend": ours.batch.backend,
            "level": ours.batch.level,
            "machine": describe_machine(args.threads),
            "commit": describe_commit(),
        }

    serve(
        {**handlers, "under": under, "time_outside": time_outside, "identify": identify},
        describe_versions(),
    )


main()
