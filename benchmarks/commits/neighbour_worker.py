"""One contestant beside busy neighbours: neighbour_worker.py MODEL THREADS, run in its checkout.

THREADS 0 leaves their number to the engine. For every line read it decodes for about half a second
and answers with seconds per token and the seconds of each native step.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from elastic_moe import Engine, SamplingParams

SECONDS, PROMPT, TOKENS = 0.4, 16, 24


def main() -> None:
    model, threads = sys.argv[1], int(sys.argv[2])
    options: dict[str, Any] = {"num_threads": threads} if threads else {}
    with Engine.from_pretrained(model, backend="cpu", dtype="bfloat16", **options) as engine:
        native = sys.modules["elastic_moe_kernels._native"]
        steps: list[float] = []
        for kind in vars(native).values():
            if isinstance(kind, type) and hasattr(kind, "advance"):
                call = kind.advance

                def timed(*arguments: Any, _call: Any = call) -> Any:
                    start = time.perf_counter()
                    try:
                        return _call(*arguments)
                    finally:
                        steps.append(time.perf_counter() - start)

                kind.advance = timed
        draws = np.random.default_rng(0)
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        print(json.dumps("ready"), flush=True)
        for _ in sys.stdin:
            steps.clear()
            tokens, start = 0, time.perf_counter()
            while (taken := time.perf_counter() - start) < SECONDS:
                engine.generate(draws.integers(300, 4000, PROMPT).tolist(), None, params)
                tokens += TOKENS
            print(json.dumps([taken / tokens, steps]), flush=True)


main()
