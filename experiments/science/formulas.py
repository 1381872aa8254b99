"""The formulas of the coherence benchmark, on plain numbers and token ids."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int]
Numbers = NDArray[np.float64]


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    """All T - n + 1 of a text of T tokens, in order."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repeated_share(texts: Sequence[Ids], n: int) -> float:
    """Mean over texts of 1 - (different n-grams of the text) / (T - n + 1).

    It is the share of n-grams that the same text has had before: 0 where none comes twice, near 1
    in a loop. Every text has at least n tokens.
    """
    found = [ngrams(text, n) for text in texts]
    return statistics.fmean(1 - len(set(grams)) / len(grams) for grams in found)


def distinct_share(texts: Sequence[Ids], n: int) -> float:
    """Distinct-n: different n-grams of all texts together over all their n-grams.

    It falls with the number of tokens, so compare texts of equal number and length alone.
    Source: Li et al. 2016, arXiv:1510.03055.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found)


def first_difference(a: Ids, b: Ids) -> int:
    """The least i with a_i != b_i; T where all T tokens are equal. Both have the same length."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((i for i, (x, y) in pairs if x != y), len(a))


def equal_share(a: Ids, b: Ids, first: int) -> float:
    """Share of the first so many positions where both have the same token: sum [a_i = b_i] / first.

    A token that comes one place later does not count as equal.
    """
    return sum(x == y for x, y in zip(a[:first], b[:first], strict=True)) / first


def divergence(
    texts: Sequence[Ids], others: Sequence[Ids], firsts: Sequence[int] = (16, 32, 64)
) -> dict[str, Any]:
    """How far two networks' answers to the same prompts differ, pair by pair.

    Returns:
        first_difference: mean index of the first token that differs; pairs that never differ count
            with their length, so it is a lower bound where `never` is above 0.
        first_differences: of every pair.
        never: share of the pairs that are equal to the end.
        equal: {n: mean share of equal tokens among the first n}.
    """
    indices = [first_difference(a, b) for a, b in zip(texts, others, strict=True)]
    equal = {
        str(n): statistics.fmean(equal_share(a, b, n) for a, b in zip(texts, others, strict=True))
        for n in firsts
    }
    never = statistics.fmean(i == len(text) for i, text in zip(indices, texts, strict=True))
    return {
        "first_difference": statistics.fmean(indices),
        "first_differences": indices,
        "never": never,
        "equal": equal,
    }


def perplexity(nats: Numbers) -> float:
    """exp of the mean nats per token, over all tokens of all texts."""
    return math.exp(float(nats.mean(dtype=np.float64)))


def by_position(values: Numbers, edges: Sequence[int]) -> list[float]:
    """Means of (W, T) values over all windows and the positions [edges_i, edges_i+1)."""
    return [float(values[:, low:high].mean()) for low, high in pairwise(edges)]


def errors_by_position(differences: Numbers, edges: Sequence[int]) -> list[float]:
    """Standard errors of `by_position` of differences: over windows, sd(window means) / sqrt(W).

    Tokens of one window are not independent; windows are taken to be.
    """
    means = [differences[:, low:high].mean(axis=1) for low, high in pairwise(edges)]
    return [float(m.std(ddof=1)) / math.sqrt(len(m)) for m in means]


def mean_and_error(differences: Numbers) -> tuple[float, float]:
    """Mean of (W, T) differences, and its standard error over the W windows."""
    edges = (0, differences.shape[1])
    return by_position(differences, edges)[0], errors_by_position(differences, edges)[0]
