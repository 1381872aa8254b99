"""The bigram that elastic-mini is compared with is an honest one."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.text.tokens import TokenStream
from experiments.elastic_mini.bigram import Bigram, fit_bigram


def test_probabilities_are_smoothed_counts_that_sum_to_one() -> None:
    bigram = Bigram(5)
    bigram.fit(np.array([0, 0, 0, 1]), np.array([1, 1, 2, 0]))
    everything = np.arange(5)
    chances = np.exp(-bigram.losses(np.zeros(5, dtype=int), everything, k=0.5))
    assert chances == pytest.approx([0.5 / 5.5, 2.5 / 5.5, 1.5 / 5.5, 0.5 / 5.5, 0.5 / 5.5])
    unseen = np.exp(-bigram.losses(np.full(5, 3), everything, k=0.5))
    assert unseen == pytest.approx([0.2] * 5)


def test_it_is_fitted_on_exactly_what_the_steps_read() -> None:
    stream = TokenStream(np.arange(512 * 6, dtype=np.uint16) % 50, bos=50, seed=1)
    plan = TrainingPlan(stages=parse_stages("2x1x1x256,4x1x2x512"))
    bigram = fit_bigram(stream, plan, 2, vocab_size=51)
    assert int(bigram.counts.sum()) == 3 * 512
    # Two sequences of 256 in the first step, two of 512 in the second; each begins with BOS.
    assert bigram.counts[50].sum() == 2 + 2
    assert all(bigram.counts[n, (n + 1) % 50] > 20 for n in range(49))
