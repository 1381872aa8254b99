"""What one step of the C++ model gives, and what it counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


# Tuples: a step of a small model is over in the time that a few dataclasses take to make.
class Counters(NamedTuple):
    """What one step did.

    Attributes:
        weight_bytes: of matrices and gains, each counted once however many rows used it.
        kv_bytes: of keys and values that attention read.
        flops: 2 per multiply-add of matrices (each row at its own width) and attention, 4 per
            normed channel.
        experts_run: (token, expert) pairs.
        rows_routed: (token, layer) pairs.
        finite: 1 if every logit is a number, else 0.
    """

    weight_bytes: int
    kv_bytes: int
    flops: int
    experts_run: int
    rows_routed: int
    finite: int

    @property
    def mean_experts(self) -> float:
        """Experts per token and MoE layer."""
        return self.experts_run / self.rows_routed if self.rows_routed else 0.0


class StepResult(NamedTuple):
    """What one step gives.

    Attributes:
        logits: (n, V) float32, of the rows asked for; (0, V) if they were not wanted.
        states: (m, T, D) float32, the stream after each of the layer counts asked for.
        topk_ids: (L, T, K) int32 if asked for: experts that ran, -1 elsewhere.
        best_ids: (n,) the most likely token of each row asked for, the first among equals; -1 if
            one of its logits is not a number.
        sequence_experts: (S,) how many (token, expert) pairs each ran.
    """

    logits: NDArray[np.float32]
    states: NDArray[np.float32] | None
    topk_ids: NDArray[np.int32] | None
    counters: Counters
    best_ids: list[int]
    sequence_experts: list[int]
