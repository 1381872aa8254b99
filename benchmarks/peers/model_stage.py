"""A whole model in turns: prefill, decode, and sub-networks of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.peers.bars import (
    LLAMA,
    REDUCED,
    REFERENCE,
    TRANSFORMERS,
    TRANSFORMERS_SMALL,
    Round,
)
from benchmarks.peers.process import Process
from benchmarks.peers.stage import (
    THREADS,
    VOCAB,
    Ask,
    Places,
    Processes,
    hold_errors,
    make_round,
    random_ids,
    relative_error,
    steps,
    turns,
)

# The three configurations that a remote client uses.
ROUTINGS = {
    "default": "L32-k2-t0.65",
    "production": "L36-k2-w6-t0.7",
    "deterministic": "k2-t0.5",
}


class ModelStage:
    """Prefill, decode and sub-networks of a whole model: "standard", "awkward" or "mini"."""

    def __init__(self, places: Places, model: str) -> None:
        self._prefix = "awkward " if model == "awkward" else ""
        self._vocab = 4096 if model == "mini" else VOCAB
        self._processes = Processes()
        self.versions = self._processes.versions
        start = self._processes.start
        folder = {"standard": places.standard, "awkward": places.awkward, "mini": places.mini}[
            model
        ]
        self._limits = start(places.project, "machine_limits", THREADS)
        slow = [] if places.slow is None else [places.slow]
        self._ours = start(places.project, "ours_model", folder, THREADS, "cpu", *slow)
        self.identity: dict[str, Any] = self._ours.ask("identify")
        self._peer: Process | None = None
        # Name of a contestant -> its process, and what its requests name besides.
        self._others: dict[str, tuple[Process, dict[str, str]]] = {}
        if model == "mini":
            reference = start(places.project, "ours_model", folder, THREADS, "reference")
            self._others[REFERENCE] = (reference, {})
        if places.peers is not None:
            self._peer = start(places.peers, "transformers_model", folder, THREADS)
            for name in TRANSFORMERS_SMALL if model == "mini" else TRANSFORMERS:
                self._others[name] = (self._peer, {"experts": name.removeprefix("transformers ")})
            if model == "standard" and places.gguf is not None:
                llama = start(places.peers, "llama_cpp_model", places.gguf, THREADS)
                self._others[LLAMA] = (llama, {})

    def check(self) -> dict[str, float]:
        """Compare all logits with float32, after 512 tokens and after 3 more.

        Returns:
            The error of each, root mean square over that of the logits.

        Raises:
            SystemExit: a contestant is wrong.
        """
        if self._peer is None:
            print("  without transformers there is nothing to compare logits with")
            return {}
        request = {"contexts": self._ids(0, 1, 512), "tokens": steps(self._ids(1, 1, 3))}
        with tempfile.TemporaryDirectory() as folder:

            def logits(process: Process, do: str, **more: str) -> np.ndarray:
                path = f"{folder}/logits.npy"
                process.ask(do, **request, path=path, **more)
                saved: np.ndarray = np.load(path)
                return saved

            exact = logits(self._peer, "float32_logits")
            errors = {"ours": relative_error(logits(self._ours, "logits"), exact)}
            for name, (process, more) in self._others.items():
                errors[name] = relative_error(logits(process, "logits", **more), exact)
        return hold_errors(errors, "transformers eager", "logits")

    def measure(self, case: str, number: int) -> Round:
        """Round `number` of a case: every contestant once, right after the limits."""
        limits = self._limits.ask("measure")
        case = case.removeprefix("awkward ")
        contexts, do = self._ids(number, 1, 64), "time_decode"
        request: dict[str, Any] = {"contexts": contexts, "tokens": steps(self._ids(-1, 1, 1 + 16))}
        if case == "prefill512":
            do, request = "time_prefill", {"contexts": self._ids(number, 1, 512), "repeats": 3}
        elif case == "decode16":
            tokens = steps(self._ids(-1, 16, 1 + 6))
            request = {"contexts": self._ids(number, 16, 32), "tokens": tokens}
        elif case == "saving":
            return self._subnets(limits, number, {name: name for name in REDUCED}, request)
        results = turns(self._asks(do, request), number)
        if case != "mini":
            return make_round(limits, results)
        slower = self._subnets(limits, number, ROUTINGS, request)
        outside = self._ours.ask("time_outside", **request)["seconds"]
        return make_round(limits, results, {**slower.other, "outside seconds": outside})

    def close(self) -> None:
        """End the contestants' processes and wait for them."""
        self._processes.stack.close()

    def _asks(self, do: str, request: dict[str, Any]) -> dict[str, Ask]:
        def ask(process: Process, more: Mapping[str, str]) -> Ask:
            return lambda: process.ask(do, **request, **more)

        asks = {"ours": ask(self._ours, {})}
        return asks | {name: ask(*other) for name, other in self._others.items()}

    def _subnets(
        self,
        limits: Mapping[str, float],
        number: int,
        routings: Mapping[str, Any],
        request: dict[str, Any],
    ) -> Round:
        """Time the full network and sub-networks of it, in an order that rotates."""
        names = {"full": "full", **routings}
        order = list(names)[number % len(names) :] + list(names)[: number % len(names)]
        results = {
            name: self._ours.ask("under", routing=names[name], wanted="time_decode", **request)
            for name in order
        }
        other = {f"{name} seconds": r["seconds"] for name, r in results.items()}
        other |= {f"{name} bytes": r["touched_bytes"] for name, r in results.items()}
        return make_round(limits, {"ours": results["full"]}, other)

    def _ids(self, seed: int, sequences: int, length: int) -> list[list[int]]:
        return random_ids(seed, sequences, length, self._vocab)
