"""One commit's side of the pipe for a model at several contexts: context_worker.py MODEL.

Run as worker.py is. Caches are filled with random numbers in place of a long prompt: nothing here
looks at results. Uses only names that both commits have.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path[:1] = [str(Path.cwd())]  # in place of this file's folder

import numpy as np  # noqa: E402

from elastic_moe.engine.running.loading import load_runner  # noqa: E402
from elastic_moe.engine.running.runner import Chunk  # noqa: E402
from elastic_moe.model.checkpoints.folder import find_checkpoint  # noqa: E402
from elastic_moe.routing import Subnet  # noqa: E402

SLICE_SECONDS = 0.3  # that decoding aims at; a chunk of a prompt is a slice by itself
CHUNK = 512


class Contexts:
    """Sequences of one model; keys and values of earlier positions are random."""

    def __init__(self, model: str) -> None:
        self.runner = load_runner(find_checkpoint(model), backend="cpu", dtype="bfloat16")
        self.subnet = Subnet.full(self.runner.config.shape)
        self.steps: dict[tuple[int, int], int] = {}
        self.draws = np.random.default_rng(0)
        self.sequences = [self.runner.open(self.subnet, 1 << 20) for _ in range(16)]

    def measure(self, kind: str, sequences: int, position: int) -> float:
        """Seconds per step of 'decode' (a token each), or of a 'prefill' of 512 tokens."""
        if kind == "prefill":
            return self._run(sequences, position, 1, CHUNK)
        steps = self.steps.get((sequences, position))
        if steps is None:  # the first of all warms up
            one = min(self._run(sequences, position, 2, 1) for _ in range(2))
            steps = self.steps[sequences, position] = max(2, min(200, int(SLICE_SECONDS / one)))
        return self._run(sequences, position, steps, 1)

    def _run(self, count: int, position: int, steps: int, tokens: int) -> float:
        sequences = self.sequences[:count]
        for sequence in sequences:
            sequence.num_computed_tokens = 0
            pages = len(sequence.block_table.pages)
            sequence.grow(position + steps * tokens)
            if len(sequence.block_table.pages) > pages:
                self._fill(sequence.pool.blocks)
            sequence.num_computed_tokens = position
        ids = self.draws.integers(0, self.runner.config.vocab_size, (steps, count, tokens))
        ids = ids.astype(np.int32)
        start = time.perf_counter()
        for step in ids:
            self.runner.run([Chunk(s, row) for s, row in zip(sequences, step, strict=True)])
        return (time.perf_counter() - start) / steps

    def _fill(self, blocks: object) -> None:
        numbers = np.asarray(blocks).view(np.uint16)
        normal = self.draws.standard_normal((numbers.shape[1],), dtype=np.float32)
        numbers[:] = normal.view(np.uint32) >> 16


def main() -> None:
    contexts = Contexts(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, sequences, position = line.split()
        print(json.dumps(contexts.measure(kind, int(sequences), int(position))), flush=True)


main()
