"""The engine's stage: what concurrent requests, mixed sub-networks and shared prefixes cost."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from benchmarks.peers.bars import LLAMA, MIXES, REPEATED, Round
from benchmarks.peers.stage import (
    THREADS,
    VOCAB,
    Places,
    Processes,
    hold_errors,
    make_round,
    random_ids,
    relative_error,
    steps,
)

CONTEXT, NEW_TOKENS = 32, 24
CONCURRENT = (1, 4, 16, 64)


class EngineStage:
    """The standard checkpoint behind the engine."""

    def __init__(self, places: Places) -> None:
        self._processes = Processes()
        self.versions = self._processes.versions
        start = self._processes.start
        self._limits = start(places.project, "machine_limits", THREADS)
        self._ours = start(places.project, "ours_engine", places.standard, THREADS)
        self.identity: dict[str, Any] = self._ours.ask("identify")
        self._llama = None
        if places.peers is not None and places.gguf is not None:
            self._llama = start(places.peers, "llama_cpp_model", places.gguf, THREADS)

    def check(self) -> dict[str, float]:
        """Compare logits with llama.cpp's. Raises SystemExit."""
        if self._llama is None:
            return {}
        request = {
            "contexts": random_ids(0, 1, 64, VOCAB),
            "tokens": steps(random_ids(1, 1, 3, VOCAB)),
        }
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/logits.npy"
            self._llama.ask("logits", **request, path=path)
            theirs = np.load(path)
            self._ours.ask("logits", **request, path=path)
            error = relative_error(np.load(path), theirs)
        return hold_errors({"ours": error}, "none", "logits against llama.cpp's")

    def measure(self, case: str, number: int) -> Round:
        """Round `number` of a case: every contestant once, right after the limits."""
        limits = self._limits.ask("measure")
        contexts = random_ids(number, 16, CONTEXT, VOCAB)
        if case == "engine16":
            return self._concurrent(limits, contexts)
        if case == "prefix":
            times = self._ours.ask(
                "prefix", ids=random_ids(number, 1, 513, VOCAB)[0], routings=REPEATED
            )
            return _round_of(limits, times)
        if case == "load":
            other: dict[str, float] = {}
            for count in CONCURRENT:
                loaded = self._ours.ask(
                    "load", contexts=random_ids(number, count, 64, VOCAB), new_tokens=32
                )
                other |= {f"{count} {name}": value for name, value in loaded.items()}
            return _round_of(limits, other)
        return self._mixed(limits, contexts, MIXES[case.removeprefix("mix ")])

    def close(self) -> None:
        """End the contestants' processes and wait for them."""
        self._processes.stack.close()

    def _decode(self, contexts: list[list[int]], routings: list[str]) -> dict[str, Any]:
        result: dict[str, Any] = self._ours.ask(
            "decode", contexts=contexts, new_tokens=NEW_TOKENS, routings=routings
        )
        return result

    def _concurrent(self, limits: dict[str, float], contexts: list[list[int]]) -> Round:
        sixteen = self._decode(contexts, ["full"] * 16)
        one = self._decode(contexts[:1], ["full"])
        results = {"ours": sixteen}
        if self._llama is not None:
            tokens = steps(random_ids(-1, 16, 1 + 8, VOCAB))
            results[LLAMA] = self._llama.ask("time_decode", contexts=contexts, tokens=tokens)
        other = {
            "one seconds": one["seconds"],
            "outside seconds": sixteen["outside_seconds"],
            "outside of one seconds": one["outside_seconds"],
            "median seconds": sixteen["median_seconds"],
        }
        return make_round(limits, results, other)

    def _mixed(
        self, limits: dict[str, float], contexts: list[list[int]], names: tuple[str, ...]
    ) -> Round:
        """Sixteen rows of each sub-network alone, then four rows of each together."""
        other: dict[str, float] = {}
        for name in names:
            alone = self._decode(contexts, [name] * 16)
            other[f"{name} seconds"] = alone["seconds"]
            other[f"{name} bytes"] = alone["touched_bytes"]
        mixed = self._decode(contexts, [names[i % len(names)] for i in range(16)])
        return make_round(limits, {"ours": mixed}, other)


def _round_of(limits: dict[str, float], other: dict[str, float]) -> Round:
    """A round that is not about bytes or FLOPs."""
    nothing = {"seconds": 1.0, "touched_bytes": 0, "flops": 0}
    return make_round(limits, {"ours": nothing}, other)
