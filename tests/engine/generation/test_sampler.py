"""Drawing tokens: the right distribution, from a counter alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from elastic_moe_kernels import native
from elastic_moe_kernels.ops.sample_reference import (
    integer_weights,
    kept_tokens,
    random_words,
    token_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.engine.generation.sampler import Sampler, choose_tokens, describe_tokens
from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.engine.sampling_params import SamplingParams

PROBABILITIES = [0.1, 0.5, 0.05, 0.3, 0.05]
LOGITS = np.log(np.array(PROBABILITIES, dtype=np.float32))


def sampler(
    prompt: tuple[int, ...] = (), choice: int = 0, ends: tuple = (), vocab: int = 5, **params: Any
) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, choice, ends, vocab)


def choose(source: Sampler, logits: np.ndarray | None, best_id: int) -> int:
    """The next token of one sequence, which goes on after it."""
    source.update_mask()
    rows = None if logits is None else logits[None]
    ((token, _),) = choose_tokens([source], rows, [0], [best_id])
    source.accept(token)
    return token


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    return describe_tokens(logits[None], [0], [token], [top])[0]


def draws(count: int = 4000, **params: Any) -> list[float]:
    """Shares of each token; penalties aside, one sampler draws them all."""
    source = sampler(**params)
    chosen = Counter(choose(source, LOGITS, int(LOGITS.argmax())) for _ in range(count))
    return [chosen[token] / count for token in range(5)]


def test_temperature_zero_takes_the_likeliest() -> None:
    greedy = sampler()
    assert greedy.logits_mode == "best"
    assert choose(greedy, None, 1) == 1
    assert sampler(logprobs=0).logits_mode == "last"
    assert choose(sampler(temperature=0.0, logit_bias={3: 5.0}), LOGITS, 1) == 3


def test_draws_follow_the_probabilities() -> None:
    found = draws(temperature=1.0, seed=5)
    assert found == pytest.approx(PROBABILITIES, abs=0.03)


def test_the_smallest_temperature_takes_the_likeliest() -> None:
    assert draws(50, temperature=5e-324) == [0, 1, 0, 0, 0]


def test_temperature_divides_the_logits() -> None:
    squared = [p**2 for p in PROBABILITIES]
    expected = [p / sum(squared) for p in squared]
    assert draws(temperature=0.5, seed=6) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 4}, {0, 1, 2, 3}),  # 2 and 4 are equal: the lower id
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.85}, {0, 1, 3}),
        ({"top_p": 0.9, "top_k": 2}, {1, 3}),
        ({"min_p": 0.59}, {1, 3}),
        ({"min_p": 0.61}, {1}),
        ({"min_p": 0.09}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.15, "top_k": 3, "top_p": 0.6}, {1, 3}),
    ],
)
def test_the_smallest_sufficient_set_is_kept(params: dict, kept: set[int]) -> None:
    found = draws(600, temperature=1.0, seed=7, **params)
    assert {token for token, share in enumerate(found) if share} == kept


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 50, 300, 1000]),
    top_k=st.integers(0, 400),
    top_p=st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    spread=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_candidates_are_those_of_sorting_everything(
    seed: int, vocab: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    """Ties included: the logits are rounded to few values."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, spread, vocab), 1).astype(np.float32)
    p = np.exp(logits.astype(np.float64) - logits.max())
    order = sorted(range(vocab), key=lambda i: (-p[i], i))
    order = [i for i in order if p[i] >= max(min_p, 2**-40)]  # less is never drawn
    order = order[: top_k or None]
    total = sum(p[i] for i in order)

    def kept(wanted: float) -> set[int]:
        """The first whose probabilities reach this sum."""
        reached, found = 0.0, []
        for i in order:
            if reached >= wanted and top_p < 1:
                break
            found.append(i)
            reached += p[i]
        return set(found)

    weights = token_weights(logits, 1.0, min_p)
    ids = kept_tokens(weights, top_k, top_p)
    # Weights of float32 may decide otherwise at the very edge of top_p.
    least, most = kept(top_p * total * (1 - 3e-6)), kept(top_p * total * (1 + 1e-6))
    assert least <= set(ids.tolist()) <= most
    assert weights[ids] == pytest.approx(p[ids], rel=1e-6)
    assert integer_weights(weights)[ids] / 2**40 == pytest.approx(p[ids], rel=1e-6, abs=2**-40)


def test_penalties_are_taken_from_what_came() -> None:
    logits = np.array([1.0, 2.0, -1.0, 0.5], dtype=np.float32)
    source = sampler(frequency_penalty=0.5, presence_penalty=0.25)
    # 1: 2.0, then 1.25, 0.75: below token 0's 1.0; then 0: 0.25; 1 again at 0.75.
    assert [choose(source, logits, 1) for _ in range(4)] == [1, 1, 0, 1]


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    positive = np.array([1.0, 1.5, 0.9], dtype=np.float32)
    assert choose(sampler(prompt=(1,), repetition_penalty=2.0), positive, 1) == 0
    assert choose(sampler(prompt=(), repetition_penalty=2.0), positive, 1) == 1
    negative = np.array([-1.0, -0.6], dtype=np.float32)
    assert choose(sampler(prompt=(1,), repetition_penalty=2.0), negative, 1) == 0
    source = sampler(repetition_penalty=2.0)
    assert [choose(source, positive, 1) for _ in range(4)] == [1, 0, 2, 1]


@pytest.mark.parametrize("penalty", [5e-324, 1e-300])
def test_a_penalty_beyond_all_numbers_still_leaves_a_choice(penalty: float) -> None:
    logits = np.array([1.0, 2.0, -1.0], dtype=np.float32)
    source = sampler(prompt=(0,), repetition_penalty=penalty, temperature=1.0)
    assert [choose(source, logits, 1) for _ in range(3)] == [0, 0, 0]


def test_a_bias_is_added_and_can_forbid() -> None:
    assert draws(300, temperature=1.0, logit_bias={1: -100, 3: -100})[1] == 0
    assert draws(300, temperature=1.0, logit_bias={2: 100})[2] == 1


def test_no_end_comes_before_min_tokens() -> None:
    source = sampler(ends=(1, 3), min_tokens=3)
    assert [choose(source, LOGITS, 1) for _ in range(5)] == [0, 0, 0, 1, 1]


def test_a_draw_depends_on_seed_choice_and_position_alone() -> None:
    def uniform(seed: int, choice: int, position: int) -> tuple[float, ...]:
        return tuple(word / 2**64 for word in random_words(seed, choice, position))

    numbers = {(s, c, p): uniform(s, c, p) for s in range(10) for c in range(4) for p in range(10)}
    every = [number for pair in numbers.values() for number in pair]
    assert len(set(every)) == 800
    assert all(0 <= number <= 1 for number in every)
    assert all(uniform(*key) == number for key, number in reversed(numbers.items()))
    assert sum(every) / 800 == pytest.approx(0.5, abs=0.05)
    assert uniform(2**64 - 1, 0, 0) != uniform(0, 0, 0)


def test_choices_of_a_seed_differ_and_repeat() -> None:
    def texts(seed: int) -> list[list[int]]:
        sources = [sampler(choice=c, temperature=1.0, seed=seed) for c in range(3)]
        return [[choose(source, LOGITS, 1) for _ in range(40)] for source in sources]

    first = texts(1)
    assert first == texts(1)
    assert first[0] != first[1] != first[2]
    assert first != texts(2)


def test_without_the_extension_the_same_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> list[int]:
        """Rows of one call, some of which have changes, a mask or nothing to draw."""
        samplers = [
            sampler(temperature=1.0, top_p=0.7, seed=1),
            sampler(temperature=1.0, frequency_penalty=1.0, prompt=(1,), repetition_penalty=2.0),
            sampler(logprobs=0),
            sampler(temperature=2.0, min_tokens=20, ends=(1, 3), logit_bias={0: -1.0}),
        ]
        found = []
        logits = np.stack([LOGITS, LOGITS[::-1]])
        for _ in range(20):
            for source in samplers:
                source.update_mask()
            for source, (token, _) in zip(
                samplers, choose_tokens(samplers, logits, [0, 1, 0, 1], [1, 3, 1, 3]), strict=True
            ):
                source.accept(token)
                found.append(token)
        return found

    native_tokens = mixed()
    monkeypatch.setattr(native, "missing", lambda: "it is not there")
    assert mixed() == native_tokens
    assert set(native_tokens[3::4]) <= {0, 2, 4}


def test_logprobs_are_natural_logarithms_before_temperature() -> None:
    reported = token_logprob(LOGITS, 3, 2)
    assert reported.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert [token for token, _ in reported.top] == [1, 3]
    assert [value for _, value in reported.top] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert token_logprob(LOGITS, 3, 0).top == ()
    assert [token for token, _ in token_logprob(LOGITS, 3, 20).top] == [1, 3, 0, 2, 4]
