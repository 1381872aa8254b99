"""elastic-moe: run_ours.py FOLDER THREADS BACKEND [KERNEL]. Runs under .venv.

KERNEL names what runs twice, to see that the bars notice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from slowdown import SLOWER, AgainExperts
from worker import Ids, model_handlers, serve

from elastic_moe.config import resolve_routing
from elastic_moe.lab.record import describe_commit, describe_machine, describe_versions
from elastic_moe.lab.runners import NativeRunner, ReferenceRunner
from elastic_moe.model.checkpoint import load_model
from elastic_moe.routing import Subnet


class Ours:
    """A runner, under the sub-network chosen last."""

    def __init__(self, folder: str, backend: str, slow: str | None) -> None:
        model = load_model(Path(folder), dtype="bfloat16")
        self.shape = model.shape
        self.native = NativeRunner(model) if backend == "cpu" else None
        self.runner = self.native or ReferenceRunner(model)
        self.subnet = Subnet.full(model.shape)
        self.again = AgainExperts(model) if slow == "experts" else None

    def start(self, contexts: Ids, keep: bool) -> np.ndarray:  # noqa: ARG002  (always keeps)
        return self._run(lambda **how: self.runner.start(contexts, self.subnet, **how))

    def decode(self, ids: Sequence[int]) -> np.ndarray:
        return self._run(lambda **how: self.runner.decode(ids, **how))

    def work(self) -> dict[str, Any]:
        """What the last call did."""
        work = self.runner.work()
        if work is None:
            return {}
        return {
            "touched_bytes": work.touched_bytes,
            "weight_bytes": work.weight_bytes,
            "flops": work.flops,
            "mean_experts": work.mean_experts,
        }

    def _run(self, call: Callable[..., torch.Tensor]) -> np.ndarray:
        if self.native is not None and self.again is not None:
            logits = call(trace=True)
            self.again(self.native)
        else:
            logits = call()
        return logits.numpy()

    def choose(self, routing: str) -> str:
        """Run this sub-network from now on; its canonical name."""
        self.subnet = resolve_routing(self.shape, routing)
        return self.subnet.name


class TimedNative:
    """Stands before the native model and adds up the seconds inside its step."""

    def __init__(self, native: Any) -> None:
        self.native, self.seconds, self.calls = native, 0.0, 0

    def step(self, inputs: Any) -> Any:
        start = time.perf_counter()
        result = self.native.step(inputs)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("threads", type=int)
    parser.add_argument("backend", choices=("cpu", "reference"))
    parser.add_argument("slow", nargs="?", choices=SLOWER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = Ours(args.folder, args.backend, args.slow)
    handlers = model_handlers(ours)

    def under(routing: str, wanted: str, **request: Any) -> Any:
        """Another request, under this sub-network."""
        name = ours.choose(routing)
        try:
            return {**handlers[wanted](**request), "name": name}
        finally:
            ours.choose("full")

    def time_outside(contexts: Ids, tokens: Ids) -> dict[str, Any]:
        """Seconds per decode step outside the native call, greedy choice of the token included."""
        if ours.native is None:
            raise SystemExit("the reference has no native call")
        packed = ours.native.packed
        timer = TimedNative(packed._native)
        ours.start(contexts, keep=True)
        ours.decode(tokens[0])
        packed._native = timer
        try:
            start = time.perf_counter()
            for ids in tokens[1:]:
                int(ours.decode(ids)[0].argmax())
            wall = time.perf_counter() - start
        finally:
            packed._native = timer.native
        return {"seconds": (wall - timer.seconds) / timer.calls}

    def identify() -> dict[str, Any]:
        return {
            "backend": ours.runner.backend,
            "level": ours.runner.level,
            "machine": describe_machine(),
            "commit": describe_commit(),
        }

    serve(
        {**handlers, "under": under, "time_outside": time_outside, "identify": identify},
        describe_versions(),
    )


main()
