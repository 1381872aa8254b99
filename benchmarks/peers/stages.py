"""What is measured, stage by stage: which processes run, and what each is asked for in a round."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.bars import (
    LLAMA,
    REDUCED,
    REFERENCE,
    TRANSFORMERS,
    TRANSFORMERS_SMALL,
    ZENTORCH,
    Round,
)
from benchmarks.peers.contestants import Process

THREADS = 2
VOCAB = 32000
STANDARD_LAYER = {"layers": 8, "experts": 64, "top_k": 8, "hidden": 1024, "channels": 512}
AWKWARD_LAYER = {"layers": 8, "experts": 61, "top_k": 5, "hidden": 1000, "channels": 520}
# The three configurations that a remote client uses.
ROUTINGS = {
    "default": "L32-k2-t0.65",
    "production": "L36-k2-w6-t0.7",
    "deterministic": "k2-t0.5",
}
MAX_ERROR = 2.0  # times that of the same model in PyTorch, both against float32
ERROR_FLOOR = 0.002  # of the root mean square: what rounding does anyway
ERROR_OF_OTHERS = 0.1  # beyond it, somebody computes something else


@dataclass(frozen=True, slots=True)
class Places:
    """Where the contestants and their files are; None where one is left out."""

    project: Path
    peers: Path | None
    zentorch: Path | None
    standard: Path
    gguf: Path | None
    awkward: Path
    mini: Path
    slow: str | None = None


Ask = Callable[[], dict[str, Any]]


@dataclass
class Processes:
    """The processes of a stage, and the limits' one."""

    stack: ExitStack = field(default_factory=ExitStack)
    versions: dict[str, str] = field(default_factory=dict)

    def start(self, python: Path, script: str, *arguments: object) -> Process:
        process = self.stack.enter_context(closing(Process(python, script, *arguments)))
        self.versions |= process.versions
        return process


def turns(asks: Mapping[str, Ask], number: int) -> dict[str, dict[str, Any]]:
    """Ask everybody, ours first (right after the limits), the others in an order that rotates."""
    names = [name for name in asks if name != "ours"]
    shift = number % max(1, len(names))
    return {name: asks[name]() for name in ["ours", *names[shift:], *names[:shift]]}


def make_round(
    limits: Mapping[str, float],
    results: Mapping[str, Mapping[str, Any]],
    other: Mapping[str, float] | None = None,
) -> Round:
    """Put a round together from what the processes said."""
    ours = results["ours"]
    return Round(
        {name: result["seconds"] for name, result in results.items()},
        ours["touched_bytes"],
        ours["flops"],
        limits["read_bytes_per_second"],
        limits["matmul_flops_per_second"],
        {"read_huge_bytes_per_second": limits["read_huge_bytes_per_second"], **(other or {})},
    )


def random_ids(seed: int, sequences: int, length: int, vocab: int) -> list[list[int]]:
    """The same for everybody: (sequences, length)."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(sequences)]


def steps(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """(sequences, steps) to (steps, sequences)."""
    return [list(step) for step in zip(*ids, strict=True)]


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference over that of what is exact."""
    return float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))


def hold_errors(errors: dict[str, float], peer: str, what: str) -> dict[str, float]:
    """Errors as they came if ours is as good as PyTorch's and nobody is far off.

    Raises:
        SystemExit: somebody is wrong.
    """
    listed = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    print(f"  errors of {what} against float32: {listed}")
    allowed = ERROR_FLOOR + MAX_ERROR * errors.get(peer, ERROR_OF_OTHERS / MAX_ERROR)
    for name, error in errors.items():
        limit = allowed if name == "ours" else max(allowed, ERROR_OF_OTHERS)
        if not error <= limit:
            raise SystemExit(f"{name} is wrong: error of {what} {error:.4f}, at most {limit:.4f}")
    return errors


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
        self._limits = start(places.project, "run_limits", THREADS)
        slow = [] if places.slow is None else [places.slow]
        self._ours = start(places.project, "run_ours", folder, THREADS, "cpu", *slow)
        self.identity: dict[str, Any] = self._ours.ask("identify")
        self._peer: Process | None = None
        # Name of a contestant -> its process, and what its requests name besides.
        self._others: dict[str, tuple[Process, dict[str, str]]] = {}
        if model == "mini":
            reference = start(places.project, "run_ours", folder, THREADS, "reference")
            self._others[REFERENCE] = (reference, {})
        if places.peers is not None:
            self._peer = start(places.peers, "run_transformers", folder, THREADS)
            for name in TRANSFORMERS_SMALL if model == "mini" else TRANSFORMERS:
                self._others[name] = (self._peer, {"experts": name.removeprefix("transformers ")})
            if model == "standard" and places.gguf is not None:
                llama = start(places.peers, "run_llama_cpp", places.gguf, THREADS)
                self._others[LLAMA] = (llama, {})

    def check(self) -> dict[str, float]:
        """Compare everybody's logits with float32, after 512 tokens and after 3 more.

        Returns:
            The error of each, root mean square over that of the logits.

        Raises:
            SystemExit: somebody is wrong.
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
        """One round of one case."""
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
        """End the processes."""
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


class LayerStage:
    """One MoE layer, cold: its cases are called layerT for T rows."""

    def __init__(self, places: Places, model: str) -> None:
        sizes = json.dumps(AWKWARD_LAYER if model == "awkward" else STANDARD_LAYER)
        self._processes = Processes()
        self.versions = self._processes.versions
        start = self._processes.start
        self._limits = start(places.project, "run_limits", THREADS)
        slow = [] if places.slow is None else [places.slow]
        self._ours = start(places.project, "run_layer", "ours", THREADS, sizes, *slow)
        self.identity: dict[str, Any] = self._ours.ask("identify")
        self._all = {"ours": self._ours}
        if model == "standard" and places.zentorch is not None:
            zentorch = start(places.zentorch, "run_layer", ZENTORCH, THREADS, sizes)
            self._all[ZENTORCH] = zentorch
        if places.peers is not None:
            # One process for all of them: the weights are large.
            who = "grouped_mm" if model == "awkward" else "grouped_mm,eager"
            peer = start(places.peers, "run_layer", who, THREADS, sizes)
            self._all |= {f"transformers {name}": peer for name in who.split(",")}

    def check(self) -> dict[str, float]:
        """Compare everybody's outputs for 64 rows with float32. Raises SystemExit."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/out.npy"
            self._ours.ask("exact", rows=64, path=path)
            exact, errors = np.load(path), {}
            for name, process in self._all.items():
                process.ask("outputs", rows=64, path=path, who=name)
                errors[name] = relative_error(np.load(path), exact)
        return hold_errors(errors, "transformers grouped_mm", "outputs")

    def measure(self, case: str, number: int) -> Round:
        """One round of one case."""
        rows = int(case.rpartition("layer")[2])
        limits = self._limits.ask("measure")

        def ask(name: str) -> Ask:
            return lambda: self._all[name].ask("time_layers", rows=rows, repeats=3, who=name)

        results = turns({name: ask(name) for name in self._all}, number)
        results["ours"] |= self._ours.ask("work", rows=rows)
        return make_round(limits, results)

    def close(self) -> None:
        """End the processes."""
        self._processes.stack.close()
