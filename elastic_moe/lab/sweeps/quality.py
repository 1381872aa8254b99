"""The quality of sub-networks: loss, distance to the full network, agreement with it.

All sub-networks that differ only in how deep they go come from one pass over the deepest.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from elastic_moe_kernels import ops
from numpy.typing import NDArray

from elastic_moe.engine.running.runner import Chunk, ExpertCounts, ModelRunner, StepOutput
from elastic_moe.errors import ElasticMoEError
from elastic_moe.lab.sweeps.text import EvaluationSet
from elastic_moe.routing import Subnet

BATCH_WINDOWS = 8
# Logits that are in memory at once, for each of a few tensors: 128 MiB. The bundled
# model's 4,096 x 4,096 of a batch fit twice; a vocabulary of 152,000 takes 220 rows at a time.
CHUNK_NUMBERS = 1 << 25
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of one sub-network on an evaluation set of N scored tokens.

    Attributes:
        losses: (N,) nats per token.
        kl_to_full: mean KL(full || this), nats per token.
        top1_agreement: fraction of tokens whose most likely prediction is the full network's.
        mean_experts: experts that ran, per token and active MoE layer.
        expert_use: {layer: (E,) fraction of the choices that fell on each expert}.
    """

    losses: Floats
    kl_to_full: float
    top1_agreement: float
    mean_experts: float
    expert_use: dict[int, list[float]]

    @property
    def nats_per_token(self) -> float:
        return float(self.losses.mean(dtype=np.float64))

    def bits_per_byte(self, scored_bytes: int) -> float:
        return float(self.losses.sum(dtype=np.float64)) / math.log(2) / scored_bytes


def paired_difference(a: Quality, b: Quality, text: EvaluationSet) -> tuple[float, float | None]:
    """Mean of a's loss minus b's, nats per token, and its standard error.

    Tokens of one window are not independent, so the error is taken over windows: with sums s_w of
    the differences and n_w scored tokens, sqrt(m/(m-1) sum (s_w - mean n_w)^2) / sum n_w. One
    window has no spread: None.
    """
    counts = np.array([window.scored for window in text.windows])
    return weighted_mean(window_sums(a, text) - window_sums(b, text), counts)


def window_deviations(quality: Quality, text: EvaluationSet) -> list[float]:
    """Nats of each window beyond its tokens' share of the loss, over all scored tokens.

    With the differences d_w of two of them and m windows, the paired error is
    sqrt(m/(m-1) sum d_w^2): what `paired_difference` gives.
    """
    counts = np.array([window.scored for window in text.windows])
    sums = window_sums(quality, text)
    deviations = (sums - sums.sum() / counts.sum() * counts) / counts.sum()
    return [round(float(each), 10) for each in deviations]


def window_sums(quality: Quality, text: EvaluationSet) -> NDArray[np.float64]:
    """(W,) nats of the scored tokens of each window of the text."""
    counts = np.array([window.scored for window in text.windows])
    starts = np.concatenate(([0], counts.cumsum()[:-1]))
    return np.add.reduceat(quality.losses.astype(np.float64), starts)


def weighted_mean(
    sums: NDArray[np.float64], counts: NDArray[np.int64]
) -> tuple[float, float | None]:
    """Mean over tokens of sums over windows, and its standard error; both of shape (W,)."""
    m, tokens = len(counts), float(counts.sum())
    mean = float(sums.sum()) / tokens
    if m < 2:
        return mean, None
    spread = m / (m - 1) * float(((sums - mean * counts) ** 2).sum())
    return mean, math.sqrt(spread) / tokens


class FullNetwork:
    """Logits of the full network on the whole evaluation set, kept for comparison.

    (N, V) float32 in a temporary file that the system may page out; it has no name and goes with
    the process.

    Raises:
        ElasticMoEError: the folder for temporary files is too small; the file grows as it is
            written, and a mapping that finds the disk full would end the process.
    """

    def __init__(self, scored_tokens: int, vocab_size: int) -> None:
        folder, needed = tempfile.gettempdir(), 4 * scored_tokens * vocab_size
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ElasticMoEError(
                f"comparing with the full network needs {needed / 1e9:.1f} GB in {folder} "
                f"({scored_tokens:,} tokens x {vocab_size:,} logits), and "
                f"{free / 1e9:.1f} GB are free. Lower --tokens, or set TMPDIR to a larger disk."
            )
        with tempfile.TemporaryFile(prefix="elastic-moe-") as file:  # the mapping outlives it
            self._logits: NDArray[np.float32] = np.memmap(
                file, dtype=np.float32, mode="w+", shape=(scored_tokens, vocab_size)
            )

    def store(self, start: int, logits: Floats) -> None:
        self._logits[start : start + len(logits)] = logits

    def read(self, start: int, count: int) -> Floats:
        return self._logits[start : start + count]


def measure_depths(
    runner: ModelRunner,
    text: EvaluationSet,
    deepest: Subnet,
    depths: Sequence[int],
    full: FullNetwork,
    *,
    is_full: bool = False,
) -> Iterator[tuple[int, dict[int, Quality]]]:
    """Measure prefix depths of one sub-network in a single pass.

    Args:
        deepest: a sub-network of depth max(depths), its layers a prefix of the model's.
        depths: which of its prefixes to measure.
        full: what to compare with; filled by this pass where `is_full`.
        is_full: `deepest` is the full network, and max(depths) its depth.

    Yields:
        (windows done, {}) after each batch, and last (windows, {depth: quality}).
    """
    sums = {depth: _Sums() for depth in depths}
    use = _ExpertUse()
    done = start = 0
    vocab_size = runner.config.vocab_size
    for batch in text.batches(BATCH_WINDOWS):
        targets = np.array([window.targets for window in batch], dtype=np.int64)  # (B, T)
        firsts = np.array([window.first_scored for window in batch])
        scored = np.arange(targets.shape[1]) >= firsts[:, None]  # (B, T)
        wanted = targets[scored]  # (n,)
        out = runner.run(
            [
                Chunk(runner.open(deepest, len(window.inputs)), window.inputs, "none")
                for window in batch
            ],
            states_after=depths,
            trace=True,
        )
        states = {depth: x[scored.flatten()] for depth, x in out.states.items()}  # (n, D)
        rows = max(1, CHUNK_NUMBERS // vocab_size)
        for first in range(0, len(wanted), rows):
            part = slice(first, first + rows)
            if is_full:
                full.store(start + first, runner.logits(states[deepest.depth][part]))
            reference = full.read(start + first, len(wanted[part]))
            for depth, x in states.items():
                itself = is_full and depth == deepest.depth
                predicted = reference if itself else runner.logits(x[part])
                sums[depth].add(predicted, wanted[part], reference)
        use.add(out)
        start += len(wanted)
        done += len(batch)
        yield done, {}
    yield done, {depth: total.quality(use, depth) for depth, total in sums.items()}


class _Sums:
    """Running sums of one sub-network's quality."""

    def __init__(self) -> None:
        self.losses: list[Floats] = []
        self.kl = 0.0
        self.agreed = 0

    def add(self, predicted: Floats, wanted: NDArray[np.int64], full: Floats) -> None:
        """predicted, full (n, V) logits; wanted (n,) ids."""
        losses, divergences, agreed = ops.divergence(predicted, full, wanted)
        self.losses.append(losses)
        self.kl += float(divergences.sum())
        self.agreed += int(agreed.sum())

    def quality(self, use: _ExpertUse, depth: int) -> Quality:
        losses = np.concatenate(self.losses)
        return Quality(
            losses=losses,
            kl_to_full=self.kl / len(losses),
            top1_agreement=self.agreed / len(losses),
            mean_experts=use.mean(depth),
            expert_use=use.shares(depth),
        )


class _ExpertUse:
    """The experts that the routers of each layer chose in one pass."""

    def __init__(self) -> None:
        self._counts = ExpertCounts()

    def add(self, out: StepOutput) -> None:
        """Count the choices of a batch."""
        assert out.expert_counts is not None
        for layer, tokens in out.expert_counts.tokens_per_expert.items():
            self._counts.add(layer, tokens, out.expert_counts.rows[layer])

    def mean(self, depth: int) -> float:
        """Experts that ran, per token and MoE layer of the first `depth` layers."""
        ran = sum(
            int(c.sum()) for layer, c in self._counts.tokens_per_expert.items() if layer < depth
        )
        rows = sum(count for layer, count in self._counts.rows.items() if layer < depth)
        return ran / rows if rows else 0.0

    def shares(self, depth: int) -> dict[int, list[float]]:
        """Layer -> fraction of its choices that fell on each expert, of the first `depth`."""
        return {
            layer: (counts / counts.sum()).tolist()
            for layer, counts in sorted(self._counts.tokens_per_expert.items())
            if layer < depth
        }
