"""Drawing tokens: those of the reference, at every level, and their probabilities."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from elastic_moe_kernels import native
from elastic_moe_kernels.ops import sample, token_logprobs
from elastic_moe_kernels.ops.sample_reference import (
    LOGIT_CHANGE,
    Changes,
    Masks,
    integer_weights,
    kept_tokens,
    new_rows,
    random_words,
    token_weights,
)

DRAWS = 200_000
NAN, INF = float("nan"), float("inf")

# V tokens
VOCAB = {
    "one-token": 1,
    "less-than-a-vector": 3,
    "one-past-a-block": 513,
    "elastic-mini": 4096,
    "several-pieces": 33_001,
}
SPREAD = {"ties": 0.0, "flat": 0.1, "peaked": 3.0, "far": 30.0}
METHODS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.7},
    "cold": {"temperature": 0.5},
    "top-p": {"top_p": 0.95},
    "low-top-p": {"top_p": 0.3},
    "top-k": {"top_k": 20},
    "min-p": {"min_p": 0.1},
    "all-three": {"top_p": 0.9, "top_k": 30, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    "penalties-top-p": {"repetition_penalty": 0.7, "frequency_penalty": -0.3, "top_p": 0.8},
}


def logits_of(vocab: int, spread: float, rows: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([vocab, int(10 * spread), seed])
    return (spread * rng.standard_normal((rows, vocab))).astype(np.float32)


def rows_of(count: int, **values: Any) -> np.ndarray:
    rows = new_rows(count)
    rows["position"] = range(count)
    for name, value in values.items():
        rows[name] = value
    return rows


def some_changes(vocab: int, rows: int, seed: int = 0) -> Changes:
    """Up to a quarter of the tokens of each row, in no order."""
    rng = np.random.default_rng(seed)
    entries = []
    for _ in range(rows):
        own = np.zeros(int(rng.integers(0, vocab // 4 + 2)), LOGIT_CHANGE)
        own["token"] = rng.permutation(vocab)[: len(own)]
        own["count"] = rng.integers(0, 3, len(own))
        own["seen"] = rng.integers(0, 2, len(own))
        own["bias"] = rng.choice([0, 1.5, -2, -100], len(own))
        entries.append(own)
    ends = np.cumsum([len(own) for own in entries], dtype=np.int64)
    return Changes(np.concatenate(entries), ends)


def some_masks(vocab: int, rows: int, seed: int = 0) -> Masks:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (3, -(-vocab // 32)), dtype=np.uint32)
    return Masks(bits, rng.integers(-1, 3, rows).astype(np.int32))


@pytest.mark.parametrize("spread", SPREAD.values(), ids=SPREAD.keys())
@pytest.mark.parametrize("vocab", VOCAB.values(), ids=VOCAB.keys())
def test_tokens_are_those_of_the_reference(vocab: int, spread: float, level: str) -> None:
    logits = logits_of(vocab, spread, rows=3)
    for number, values in enumerate(({"temperature": 0}, *METHODS.values())):
        rows = rows_of(12, seed=2**64 - 1 - number, **values)
        rows["choice"] = number
        arguments: dict[str, Any] = {
            "logits_rows": np.arange(12, dtype=np.int32) % 3,
            "changes": some_changes(vocab, 12, number) if number % 2 else None,
            "masks": some_masks(vocab, 12, number) if number % 3 == 2 else None,
        }
        want = sample(logits, rows, **arguments, implementation="reference")
        got = sample(logits, rows, **arguments, implementation="cpu", level=level)
        assert got.tolist() == want.tolist()


@functools.cache
def reference_tokens(top_p: float, top_k: int) -> list[int]:
    rows = rows_of(30, top_p=top_p, top_k=top_k)
    return [
        int(sample(big_row(), rows[i : i + 1], implementation="reference")[0]) for i in range(30)
    ]


@functools.cache
def big_row() -> np.ndarray:
    return logits_of(151_936, 1.0)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.5, 0), (0.95, 40)])
def test_a_row_that_threads_share_has_the_same_token(top_p: float, top_k: int, level: str) -> None:
    rows = rows_of(30, top_p=top_p, top_k=top_k)
    for threads in (1, 2, 3):
        options: Any = {"implementation": "cpu", "level": level, "threads": threads}
        got = [int(sample(big_row(), rows[i : i + 1], **options)[0]) for i in range(30)]
        assert got == reference_tokens(top_p, top_k)


@pytest.mark.usefixtures("threads")
def test_a_token_depends_on_its_row_alone(level: str) -> None:
    logits, rows = logits_of(4096, 1.0, rows=40), rows_of(40, seed=9, top_p=0.8)
    changes, masks = some_changes(4096, 40), some_masks(4096, 40)
    rows["frequency_penalty"] = 0.5
    options: Any = {"implementation": "cpu", "level": level}
    alone = []
    for i in range(40):
        first = changes.ends[i - 1] if i else 0
        own = changes.entries[first : changes.ends[i]]
        alone += sample(
            logits[i : i + 1],
            rows[i : i + 1],
            changes=Changes(own, np.array([len(own)], np.int64)),
            masks=Masks(masks.bits, masks.rows[i : i + 1]),
            **options,
        ).tolist()
    for threads in (1, 2, 3):
        together = sample(logits, rows, changes=changes, masks=masks, threads=threads, **options)
        assert together.tolist() == alone


@functools.cache
def probabilities(method: str) -> tuple[np.ndarray, np.ndarray, Changes | None]:
    """Logits (1, V) of 60 tokens, their exact probabilities (V,), what changes them."""
    logits = logits_of(60, 1.5)
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | METHODS[method]
    x, changes = logits[0].astype(np.float64), None
    if "repetition_penalty" in values:
        entries = np.zeros(20, LOGIT_CHANGE)
        entries["token"], entries["seen"] = np.arange(20) * 3, 1
        entries["count"], entries["bias"] = np.arange(20) % 3, np.arange(20) % 2 * 0.7
        changes = Changes(entries, np.array([20], np.int64))
        for token, count, _, bias in entries:
            penalty = values["repetition_penalty"]
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
            if count:
                x[token] -= values["frequency_penalty"] * count
                x[token] -= values.get("presence_penalty", 0)
            x[token] += bias
    p = np.exp((x - x.max()) / values["temperature"])
    order = [i for i in np.argsort(-p) if p[i] >= values["min_p"]][: values["top_k"] or None]
    reached = np.cumsum(p[order]) / p[order].sum()
    order = order[: int(np.searchsorted(reached, values["top_p"])) + 1]
    kept = np.zeros_like(p)
    kept[order] = p[order]
    return logits, kept / kept.sum(), changes


@pytest.mark.parametrize("method", METHODS)
def test_draws_have_the_exact_probabilities(method: str) -> None:
    """Chi-square of 200,000 draws: above the bound in one of 10^5 cases if all is right."""
    logits, p, changes = probabilities(method)
    rows = rows_of(DRAWS, seed=3, **METHODS[method])
    if changes is not None:
        entries = np.tile(changes.entries, DRAWS)
        changes = Changes(entries, np.arange(1, DRAWS + 1, dtype=np.int64) * 20)
    same = np.zeros(DRAWS, np.int32)
    found = sample(logits, rows, logits_rows=same, changes=changes, implementation="cpu")
    counts = np.bincount(found, minlength=len(p))
    assert not counts[p == 0].any()
    expected = DRAWS * p[p > 0]
    chi_square = float((np.square(counts[p > 0] - expected) / expected).sum())
    degrees = len(expected) - 1
    # Wilson and Hilferty's approximation of the quantile at 4.27 standard deviations.
    share = 2 / (9 * degrees)
    assert chi_square < degrees * (1 - share + 4.27 * math.sqrt(share)) ** 3


def test_a_draw_that_top_p_refuses_is_drawn_again(level: str) -> None:
    """Both ways to a token are taken, and end at a token that top_p keeps."""
    logits = logits_of(1000, 1.0)
    weights = token_weights(logits[0], 1.0)
    kept = set(kept_tokens(weights, 0, 0.5).tolist())
    every = sample(logits, rows := rows_of(300), logits_rows=np.zeros(300, np.int32))
    rows["top_p"] = 0.5
    found = sample(
        logits, rows, logits_rows=np.zeros(300, np.int32), implementation="cpu", level=level
    )
    assert set(found.tolist()) <= kept
    stays = [token in kept for token in every.tolist()]
    assert 0.4 < np.mean(stays) < 0.6
    assert (found == every).tolist() == stays


def test_numpys_philox_gives_the_random_numbers(level: str) -> None:
    """One of 2^16 equal tokens is the first 16 bits of the first number."""
    logits, rows = np.zeros((1, 2**16), np.float32), rows_of(64)
    rng = np.random.default_rng(1)
    for name in ("seed", "choice", "position"):
        rows[name] = rng.integers(0, 2**64, 64, dtype=np.uint64)
    same = np.zeros(64, np.int32)
    got = sample(logits, rows, logits_rows=same, implementation="cpu", level=level)
    keys = [tuple(map(int, row[["seed", "choice", "position"]])) for row in rows]
    assert got.tolist() == [random_words(*key)[0] >> 48 for key in keys]


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("values", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 2}])
def test_what_is_no_number_is_never_drawn(values: dict[str, Any], implementation: Any) -> None:
    logits = np.array(
        [
            [NAN, 1, NAN, -1, NAN],
            [-INF, -INF, 2, -INF, NAN],
            [NAN] * 5,
            [-INF] * 5,
            [0, INF, 0, 0, 0],
            [INF] * 5,
        ],
        np.float32,
    )
    for seed in range(10):
        found = sample(logits, rows_of(6, seed=seed, **values), implementation=implementation)
        assert found[0] in (1, 3)
        assert found[1:].tolist() == [2, -1, -1, -1, -1]


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_a_mask_that_forbids_all_leaves_no_token(implementation: Any) -> None:
    masks = Masks(np.array([[0], [4]], np.uint32), np.array([0, 1, -1], np.int32))
    logits = np.array([[0, 0, -50]] * 3, np.float32)
    found = sample(logits, rows_of(3, top_p=0.5), masks=masks, implementation=implementation)
    assert found[:2].tolist() == [-1, 2]
    assert found[2] in (0, 1)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_temperatures_beyond_all_numbers(temperature: float, level: str) -> None:
    logits, rows = logits_of(7, 1.0), rows_of(50, temperature=temperature)
    same = np.zeros(50, np.int32)
    found = sample(logits, rows, logits_rows=same, implementation="cpu", level=level)
    assert set(found.tolist()) == (set(range(7)) if temperature > 1 else {int(logits.argmax())})


def test_greedy_takes_the_first_among_equals(level: str) -> None:
    logits = np.zeros((1, 5000), np.float32)
    logits[0, [4321, 1234, 4999]] = 1
    rows = rows_of(1, temperature=0)
    assert sample(logits, rows, implementation="cpu", level=level).tolist() == [1234]


@pytest.mark.parametrize("spread", SPREAD.values(), ids=SPREAD.keys())
def test_weights_are_those_of_float64(spread: float) -> None:
    logits = logits_of(5000, spread)[0]
    exact = np.exp(logits.astype(np.float64) - logits.max())
    weights = token_weights(logits, 1.0)
    drawn = exact >= 2.0**-40 * (1 + 1e-5)
    np.testing.assert_allclose(weights[drawn], exact[drawn], rtol=5e-6)
    assert not weights[exact < 2.0**-40 * (1 - 1e-5)].any()
    assert weights.max() == 1
    floors = [math.floor(float(weight) * 2**40) for weight in weights]
    assert integer_weights(weights).tolist() == floors


@pytest.mark.parametrize("spread", SPREAD.values(), ids=SPREAD.keys())
@pytest.mark.parametrize("vocab", VOCAB.values(), ids=VOCAB.keys())
def test_logprobs_are_those_of_float64(vocab: int, spread: float, level: str) -> None:
    """And the same at every level."""
    logits = logits_of(vocab, spread, rows=4)
    ids = np.random.default_rng(0).integers(0, vocab, 9).astype(np.int32)
    rows = np.arange(9, dtype=np.int32) % 4
    top = min(20, vocab)
    want = token_logprobs(logits, ids, top, logits_rows=rows, implementation="reference")
    options: Any = {"logits_rows": rows, "implementation": "cpu"}
    got = token_logprobs(logits, ids, top, level=level, **options)
    assert got.top_ids.tolist() == want.top_ids.tolist()
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, rtol=0, atol=1e-6)
    first = token_logprobs(logits, ids, top, level=native.levels()[0], **options)
    assert got.logprobs.tolist() == first.logprobs.tolist()
    assert got.top_logprobs.tolist() == first.top_logprobs.tolist()


def test_most_likely_tokens_of_ascending_and_equal_logits(level: str) -> None:
    logits = np.stack([np.arange(1000), np.zeros(1000), np.arange(1000)[::-1] // 2])
    ids = np.zeros(3, np.int32)
    found = token_logprobs(logits.astype(np.float32), ids, 5, implementation="cpu", level=level)
    assert found.top_ids.tolist() == [[999, 998, 997, 996, 995], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert found.logprobs[1] == pytest.approx(-math.log(1000))
