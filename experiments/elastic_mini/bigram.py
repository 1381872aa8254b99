"""The weakest opponent that a language model has to beat: an add-k bigram over the same tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.text.tokens import TokenStream


class Bigram:
    """P(next | last) = (count(last, next) + k) / (count(last) + k V)."""

    def __init__(self, vocab_size: int) -> None:
        self.counts: NDArray[np.int32] = np.zeros((vocab_size, vocab_size), dtype=np.int32)

    def fit(self, last: NDArray[np.integer], following: NDArray[np.integer]) -> None:
        """Count pairs; both arrays hold ids and have one shape."""
        np.add.at(self.counts, (last.reshape(-1), following.reshape(-1)), 1)

    def losses(
        self, last: NDArray[np.integer], following: NDArray[np.integer], k: float
    ) -> NDArray[np.float64]:
        """Nats of each pair."""
        totals = self.counts.sum(axis=1, dtype=np.int64)
        chance = (self.counts[last, following] + k) / (totals[last] + k * len(totals))
        nats: NDArray[np.float64] = -np.log(chance)
        return nats


def fit_bigram(stream: TokenStream, plan: TrainingPlan, steps: int, vocab_size: int) -> Bigram:
    """A bigram over exactly the inputs and targets that the first `steps` steps trained on."""
    bigram = Bigram(vocab_size)
    piece = 0
    for step in range(steps):
        stage = plan.stage(step)
        bigram.fit(*stream.batch(piece, stage.pieces, stage.length))
        piece += stage.pieces
    return bigram
