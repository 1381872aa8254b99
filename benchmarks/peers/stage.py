"""What the stages share: their processes, rounds that take turns, and the check of results."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.bars import Round
from benchmarks.peers.process import Process

THREADS = 2
VOCAB = 32000
MAX_ERROR = 2.0  # times that of the same model in PyTorch, both against float32
ERROR_FLOOR = 0.002  # of the root mean square: what rounding does anyway
ERROR_OF_OTHERS = 0.1  # beyond it, a contestant computes something else


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
    """Ask ours first (right after the limits), then the others in an order that rotates."""
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
    """Ids (sequences, length) that depend on the seed alone: equal for all contestants."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(sequences)]


def steps(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """(sequences, steps) to (steps, sequences)."""
    return [list(step) for step in zip(*ids, strict=True)]


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference over that of what is exact."""
    return float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))


def hold_errors(errors: dict[str, float], peer: str, what: str) -> dict[str, float]:
    """The errors, if ours is as good as PyTorch's and no other is far off.

    Raises:
        SystemExit: one is wrong.
    """
    listed = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    print(f"  errors of {what} against float32: {listed}")
    allowed = ERROR_FLOOR + MAX_ERROR * errors.get(peer, ERROR_OF_OTHERS / MAX_ERROR)
    for name, error in errors.items():
        limit = allowed if name == "ours" else max(allowed, ERROR_OF_OTHERS)
        if not error <= limit:
            raise SystemExit(f"{name} is wrong: error of {what} {error:.4f}, at most {limit:.4f}")
    return errors
