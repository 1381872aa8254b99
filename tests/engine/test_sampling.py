"""Drawing tokens: the right distribution, from a counter alone."""

from __future__ import annotations

import math

import pytest
import torch

from elastic_moe.engine.request import SamplingParams
from elastic_moe.engine.sampling import choose_token, token_logprob, uniform

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05]))


def draws(params: SamplingParams, count: int = 4000) -> list[float]:
    chosen = [choose_token(LOGITS, params, position) for position in range(count)]
    return [chosen.count(token) / count for token in range(5)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert choose_token(LOGITS, SamplingParams(), 0) == 1


def test_draws_follow_the_probabilities() -> None:
    found = draws(SamplingParams(temperature=1.0, seed=5))
    assert found == pytest.approx([0.1, 0.5, 0.05, 0.3, 0.05], abs=0.03)


def test_temperature_divides_the_logits() -> None:
    squared = [p**2 for p in (0.1, 0.5, 0.05, 0.3, 0.05)]
    expected = [p / sum(squared) for p in squared]
    assert draws(SamplingParams(temperature=0.5, seed=6)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.85}, {0, 1, 3}),
        ({"top_p": 0.9, "top_k": 2}, {1, 3}),
    ],
)
def test_top_k_and_top_p_keep_the_smallest_sufficient_set(params: dict, kept: set[int]) -> None:
    found = draws(SamplingParams(temperature=1.0, seed=7, **params), count=600)
    assert {token for token, share in enumerate(found) if share} == kept


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    numbers = {(s, p): uniform(s, p) for s in range(20) for p in range(20)}
    assert len(set(numbers.values())) == 400
    assert all(0 <= number < 1 for number in numbers.values())
    assert all(uniform(s, p) == number for (s, p), number in reversed(numbers.items()))
    assert sum(numbers.values()) / 400 == pytest.approx(0.5, abs=0.05)


def test_logprobs_are_natural_logarithms_before_temperature() -> None:
    told = token_logprob(LOGITS, 3, 2)
    assert told.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert [token for token, _ in told.top] == [1, 3]
