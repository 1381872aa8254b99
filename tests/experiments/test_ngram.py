"""Kneser-Ney: against the textbook's formulas, one n-gram at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.errors import TrainingError
from elastic_moe.train.step.plan import parse_stages
from experiments.elastic_mini.ngram import KneserNey, fit_kneser_ney
from tests.train.tiny import PLAN, stream

BOS = 0


def test_keys_that_do_not_fit_into_64_bits_are_refused() -> None:
    rows = np.ones((2, 8), dtype=np.int64)
    assert KneserNey(rows, 2**12, bos=BOS, order=5).bits * 5 == 60
    with pytest.raises(TrainingError, match=r"order must be in \[1, 4\] for 8192 words, got 5"):
        KneserNey(rows, 2**13, bos=BOS, order=5)
    assert KneserNey(rows, 2**16, bos=BOS, order=4).bits * 4 == 64


def textbook(sequences: list[list[int]], vocab: int, order: int, context: list[int]) -> list[float]:
    """P(. | context) by the definitions, with dictionaries."""

    def level(n: int) -> Counter:
        grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
        raw = Counter(grams)
        if n == order:
            return raw
        longer = {tuple(s[i : i + n + 1]) for s in sequences for i in range(len(s) - n)}
        before = Counter(gram[1:] for gram in longer)
        return Counter({g: raw[g] if g[0] == BOS and g not in before else before[g] for g in raw})

    chances = [1 / vocab] * vocab
    for n in range(1, order + 1):
        counts = level(n)
        many = [sum(c == i for c in counts.values()) for i in range(5)]
        d = [0.0, 0.5, 1.0, 1.5]
        if min(many[1:4]) > 0:
            y = many[1] / (many[1] + 2 * many[2])
            found = [i - (i + 1) * y * many[i + 1] / many[i] for i in (1, 2, 3)]
            if min(found) > 0:
                d = [0.0, *found]
        own = tuple(context[len(context) - n + 1 :]) if n > 1 else ()
        if len(own) < n - 1:
            break
        follow = {g[-1]: c for g, c in counts.items() if g[:-1] == own}
        total = sum(follow.values())
        if not total:
            continue
        left = sum(d[min(c, 3)] for c in follow.values())
        chances = [
            (max(follow.get(w, 0) - d[min(follow.get(w, 0), 3)], 0) + left * chances[w]) / total
            for w in range(vocab)
        ]
    return chances


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=7, max_size=7), min_size=1, max_size=12),
    order=st.integers(1, 5),
    texts=st.lists(st.lists(st.integers(1, 5), min_size=4, max_size=4), min_size=1, max_size=3),
)
def test_every_probability_is_the_textbooks(
    rows: list[list[int]], order: int, texts: list[list[int]]
) -> None:
    sequences = [[BOS, *row] for row in rows]
    model = KneserNey(np.array(sequences), 6, BOS)
    targets = np.array(texts)
    inputs = np.concatenate([np.zeros((len(texts), 1), int), targets[:, :-1]], axis=1)
    expected = [
        [
            -np.log(textbook(sequences, 6, order, [BOS, *text[:i]])[text[i]])
            for i in range(len(text))
        ]
        for text in texts
    ]
    if order < 5:  # the lower orders of a model of order n are those of n alone
        model = KneserNey(np.array(sequences), 6, BOS, order)
    assert model.losses(inputs, targets, order) == pytest.approx(np.array(expected), rel=1e-9)


def test_chances_sum_to_one() -> None:
    rows = np.random.default_rng(0).integers(1, 8, (20, 30))
    model = KneserNey(np.concatenate([np.zeros((20, 1), int), rows], axis=1), 8, BOS)
    context = np.array([0, 3, 5, 1])
    for order in range(1, 6):
        total = sum(
            np.exp(-model.losses(context[None], np.append(context[1:], word)[None], order)[0, -1])
            for word in range(8)
        )
        assert total == pytest.approx(1)


def test_a_longer_context_helps_where_the_text_has_one() -> None:
    """The third word is the sum of the two before it: no bigram can know it."""
    draw = np.random.default_rng(1).integers(1, 4, (400, 2))
    rows = np.concatenate([np.zeros((400, 1), int), draw, draw.sum(1, keepdims=True)], axis=1)
    model = KneserNey(rows, 8, BOS)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    nats = [model.losses(inputs, targets, order)[:, 2].mean() for order in (1, 2, 3)]
    assert nats[2] < 0.1 < nats[1] < nats[0]


def test_it_is_fitted_on_what_a_run_has_read_and_on_each_piece_once() -> None:
    source = stream()
    plan = replace(PLAN, stages=parse_stages("2x30x3x128"))  # 90 pieces of a stream of 40
    model = fit_kneser_ney(source, plan, 30, 64, order=2)
    inputs, targets = source.batch(0, 40, 512)
    assert model.losses(inputs, targets, 2).mean() < 0.02
    once = KneserNey(np.concatenate([inputs[:, :1], targets], axis=1), 64, source.bos, order=2)
    assert np.array_equal(model.losses(inputs, targets, 2), once.losses(inputs, targets, 2))
    first = fit_kneser_ney(source, plan, 1, 64, order=2)
    assert first.losses(inputs, targets, 2).mean() > model.losses(inputs, targets, 2).mean()


@pytest.mark.parametrize(("vocab", "order", "most"), [(64, 6, 5), (64, 0, 5), (70_000, 5, 3)])
def test_an_order_whose_keys_do_not_fit_is_refused(vocab: int, order: int, most: int) -> None:
    with pytest.raises(TrainingError, match=rf"order must be in \[1, {most}\] for {vocab} words"):
        KneserNey(np.zeros((1, 9), int), vocab, BOS, order)
