"""What it means to draw a token from logits, in numpy; `ops.sample` checks and chooses who does it.

The C++ kernel gives the same tokens to the last one: weights come from float32 additions and
multiplications, which round alike everywhere, and what is summed are integers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Logits = NDArray[np.float32]

# How one row is sampled; C++ has it as SamplingRow. temperature 0 takes the most likely token,
# top_k 0 keeps all. A draw is a function of seed, choice and position.
SAMPLING_ROW = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("top_k", np.int64),
        ("seed", np.uint64),
        ("choice", np.uint64),
        ("position", np.uint64),
    ]
)
# What happens to the logit of one token; C++ has it as LogitChange. count: how often it was
# generated, for the frequency and the presence penalty; seen: 1 for the repetition penalty.
LOGIT_CHANGE = np.dtype(
    [("token", np.int64), ("count", np.int64), ("seen", np.int64), ("bias", np.float64)]
)

_ONE = 1 << 40  # a weight of 1, as an integer
_LEAST = np.float32(2.0**-40)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Changes(NamedTuple):
    """What happens to logits before the temperature.

    Attributes:
        entries: (N,) `LOGIT_CHANGE`, those of row 0 first; a token at most once in a row.
        ends: (R,) int64 ascending, where the entries of each row end; the last is N.
    """

    entries: NDArray[np.void]
    ends: NDArray[np.int64]


class Masks(NamedTuple):
    """Which tokens may come.

    Attributes:
        bits: (M, W) uint32, W >= V / 32: bit i of word j is that of token 32j + i.
        rows: (R,) int32 in [-1, M): the mask of each row, -1 for none.
    """

    bits: NDArray[np.uint32]
    rows: Ints


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities.

    Attributes:
        logprobs: (R,) float64, of the tokens asked for.
        top_ids: (R, N) int32, the most likely tokens, best first, among equals the lower id.
        top_logprobs: (R, N) float64.
    """

    logprobs: NDArray[np.float64]
    top_ids: Ints
    top_logprobs: NDArray[np.float64]


def new_rows(count: int) -> NDArray[np.void]:
    """(R,) `SAMPLING_ROW` that draw from all tokens at temperature 1 with seed 0."""
    rows = np.zeros(count, SAMPLING_ROW)
    for name in ("temperature", "top_p", "repetition_penalty"):
        rows[name] = 1
    return rows


def sample(
    logits: Logits,
    rows: NDArray[np.void],
    logits_rows: Ints,
    changes: Changes | None = None,
    masks: Masks | None = None,
) -> Ints:
    """`ops.sample`, row by row; arguments are checked there."""
    token_ids: Ints = np.empty(len(rows), np.int32)
    for r, row in enumerate(rows):
        x = logits[logits_rows[r]]
        if changes is not None:
            own = changes.entries[changes.ends[r - 1] if r else 0 : changes.ends[r]]
            x = _changed(x, row, own)
        if masks is not None and masks.rows[r] != -1:
            allowed = np.unpackbits(masks.bits[masks.rows[r]].view(np.uint8), bitorder="little")
            x = np.where(allowed[: len(x)] == 1, x, np.float32(-np.inf))
        token_ids[r] = _sample_row(x, row)
    return token_ids


def _sample_row(x: Logits, row: np.void) -> int:
    best = np.fmax.reduce(x)
    if not np.isfinite(best):
        return -1
    if row["temperature"] == 0:
        return int((x == best).argmax())
    weights = token_weights(x, float(row["temperature"]), float(row["min_p"]))
    ids = kept_tokens(weights, int(row["top_k"]), float(row["top_p"]))
    first, second = random_words(int(row["seed"]), int(row["choice"]), int(row["position"]))
    if row["top_p"] < 1 and not 0 < row["top_k"] < len(x):
        # From all tokens, and if that is one that top_p cuts off, again from those it keeps.
        token = _token_at(weights, np.flatnonzero(weights), first)
        return token if token in ids else _token_at(weights, ids, second)
    return _token_at(weights, ids, first)


def token_weights(x: Logits, temperature: float, min_p: float = 0.0) -> Logits:
    """(V,) exp((x - max(x)) / temperature); 0 below 2^-40, below min_p, and of NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        log2e_over_temperature = np.float64(1.4426950408889634) / np.float64(temperature)
        scale = np.float32(min(max(log2e_over_temperature, 2.0**-126), 2.0**126))
        z = (x - np.fmax.reduce(x)) * scale
    weights = _exp2_nonpositive(np.fmax(z, np.float32(-64)))
    least = max(np.float32(min_p), _LEAST)
    return np.where(weights >= least, weights, np.float32(0))


def _exp2_nonpositive(x: Logits) -> Logits:
    """2^x for x in [-64, 0], to the bit as kernels/csrc/ops/sample.h computes it."""
    rounder = np.float32(12582912.0)
    shifted = x + rounder  # its last bits are x, rounded to an integer
    f = x - (shifted - rounder)
    p = np.full_like(x, float.fromhex("0x1.41fbbcp-13"))
    for coefficient in ("0x1.5f3e54p-10", "0x1.3b2d4cp-7", "0x1.c6aee8p-5", "0x1.ebfbdcp-3"):
        p = p * f + np.float32(float.fromhex(coefficient))
    p = p * f + np.float32(float.fromhex("0x1.62e430p-1"))
    p = p * f + np.float32(1)
    found: Logits = (p.view(np.int32) + (shifted.view(np.int32) << 23)).view(np.float32)
    return found


def integer_weights(weights: Logits) -> NDArray[np.uint64]:
    """Weights as they are summed: exactly, in any order."""
    return (weights.astype(np.float64) * _ONE).astype(np.uint64)


def kept_tokens(weights: Logits, top_k: int, top_p: float) -> NDArray[np.intp]:
    """Ids of the tokens that top_k, then top_p leave, best first, among equals the lower id."""
    ids = np.lexsort((np.arange(len(weights)), -weights))[: np.count_nonzero(weights)]
    if top_k > 0:
        ids = ids[:top_k]
    if top_p < 1:
        reached = integer_weights(weights[ids]).cumsum()
        # The smallest set that reaches top_p, up to a millionth: a token stays if those before it
        # fall short.
        share = int(top_p * (1 - 2.0**-20) * 2.0**62)
        enough = max(-(-int(reached[-1]) * share >> 62), 1)
        ids = ids[: int(np.searchsorted(reached, np.uint64(enough), side="left")) + 1]
    return ids


def _token_at(weights: Logits, ids: NDArray[np.intp], random: int) -> int:
    """The token at a random place of its 2^64 where the tokens `ids` lie by their ids."""
    ids = np.sort(ids)
    reached = integer_weights(weights[ids]).cumsum()
    place = int(reached[-1]) * random >> 64
    return int(ids[np.searchsorted(reached, np.uint64(place), side="right")])


def random_words(seed: int, choice: int, position: int) -> tuple[int, int]:
    """Two numbers in [0, 2^64) that are a function of the arguments (Philox 4x64)."""
    key, counter = np.array([seed, choice], np.uint64), np.array([0, 0, 0, position], np.uint64)
    first, second = np.random.Philox(key=key, counter=counter).random_raw(2)
    return int(first), int(second)


def _changed(x: Logits, row: np.void, own: NDArray[np.void]) -> Logits:
    """A copy of logits (V,) after the changes of their row."""
    tokens = own["token"]
    new, penalty = x[tokens].astype(np.float64), row["repetition_penalty"]
    with np.errstate(over="ignore", invalid="ignore"):
        penalised = np.where(new > 0, new / penalty, new * penalty)
        new = np.where(own["seen"] != 0, penalised, new)
        taken = row["frequency_penalty"] * own["count"] + row["presence_penalty"]
        new = np.where(own["count"] != 0, new - taken, new) + own["bias"]
    x = x.copy()
    x[tokens] = np.clip(new, -_FLOAT32_MAX, _FLOAT32_MAX)
    return x


def token_logprobs(logits: Logits, token_ids: Ints, top: int, logits_rows: Ints) -> TokenLogprobs:
    """`ops.token_logprobs` in float64."""
    count, vocab = len(token_ids), logits.shape[1]
    found = TokenLogprobs(np.empty(count), np.empty((count, top), np.int32), np.empty((count, top)))
    for r in range(count):
        x = logits[logits_rows[r]].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            best = np.fmax.reduce(x)
            x = x - best - np.log(np.nansum(np.exp(x - best)))
        found.logprobs[r] = x[token_ids[r]]
        found.top_ids[r] = np.lexsort((np.arange(vocab), -x))[:top]
        found.top_logprobs[r] = x[found.top_ids[r]]
    return found
