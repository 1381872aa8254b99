"""Choosing the next token from logits.

All of it is arithmetic on one row, in float64: what runs beside it changes no bit. Randomness is
counter-based: a draw is a function of seed, choice and position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.engine.running.runner import LogitsMode
from elastic_moe.engine.sampling_params import SamplingParams

Logits = NDArray[np.float32]
_FIRST_LOOK = 256  # most likely tokens that are sorted before all are
_HUGE = 1e300  # of logits, whatever a penalty makes of them
# Of log-probabilities. numpy's exp and log differ in their last bits from one processor to the
# next; float32 logits, which these come from, have no more than this.
_DECIMALS = 7


class Grammar(Protocol):
    """Which tokens structured output allows next."""

    def allowed(self) -> NDArray[np.bool_]:
        """(V,) whether each token may come; an end token where the text may end."""

    def accept(self, token: int) -> None:
        """Advance by a token that was sampled."""


class Sampler:
    """Chooses the tokens of one choice, in their order.

    Args:
        prompt: token ids, for the repetition penalty.
        choice: its index.
        end_ids: tokens that end a text.
        grammar: of structured output.
        forced: the tokens that must come.

    Attributes:
        logits_mode: what it needs of the model: 'best' or 'last'.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        choice: int,
        end_ids: Collection[int],
        *,
        grammar: Grammar | None = None,
        forced: Sequence[int] | None = None,
    ) -> None:
        self._params, self._choice, self._grammar, self._forced = params, choice, grammar, forced
        self._end_ids = sorted(end_ids)
        self._generated: Counter[int] = Counter()
        self._seen = set(prompt) if params.repetition_penalty != 1 else set()
        self._position = 0
        self._bias = params.logit_bias or {}
        self._penalised = bool(params.frequency_penalty or params.presence_penalty)
        plain = (
            not self._penalised
            and params.repetition_penalty == 1
            and not self._bias
            and grammar is None
            and not params.min_tokens
        )
        # Whether the most likely token, or a forced one, is enough.
        self._by_best = (plain and params.temperature == 0) or forced is not None
        self.logits_mode: LogitsMode = (
            "best" if self._by_best and params.logprobs is None else "last"
        )

    def choose(self, logits: Logits | None, best_id: int) -> int:
        """The next token.

        Args:
            logits: (V,) or None if `logits_mode` is 'best'.
            best_id: the most likely token.
        """
        if self._forced is not None:
            token = self._forced[self._position]
        elif self._by_best:
            token = best_id
        else:
            assert logits is not None
            token = self._sample(logits)
        if not self._by_best:
            self._generated[token] += 1
            if self._params.repetition_penalty != 1:
                self._seen.add(token)
            if self._grammar is not None:
                self._grammar.accept(token)
        self._position += 1
        return token

    def _sample(self, logits: Logits) -> int:
        params = self._params
        x = self._adjust(logits)
        if params.temperature == 0:
            return int(x.argmax())  # the first among equals
        with np.errstate(over="ignore"):  # far below the best is nothing, however far
            scaled = (x - x.max()) / params.temperature
        ids, weights = _candidates(scaled, params)
        reached = weights.cumsum()
        drawn = uniform(params.seed, self._choice, self._position) * reached[-1]
        index = int(np.searchsorted(reached, drawn, side="right"))
        return int(ids[min(index, len(ids) - 1)])

    def _adjust(self, logits: Logits) -> NDArray[np.float64]:
        """Logits after penalties, biases and what may not come."""
        params, x = self._params, logits.astype(np.float64)
        if self._seen:
            seen = np.fromiter(self._seen, np.int64)
            old = x[seen]
            factor = params.repetition_penalty
            with np.errstate(over="ignore"):
                new = np.where(old > 0, old / factor, old * factor)
            x[seen] = np.clip(new, -_HUGE, _HUGE)  # infinities have no difference
        if self._penalised and self._generated:
            ids = np.fromiter(self._generated, np.int64)
            counts = np.fromiter(self._generated.values(), np.float64)
            x[ids] -= params.frequency_penalty * counts + params.presence_penalty
        for token, bias in self._bias.items():
            x[token] += bias
        if self._grammar is not None:
            x[~self._grammar.allowed()] = -np.inf
        if self._position < params.min_tokens:
            kept = x[self._end_ids]
            x[self._end_ids] = -np.inf
            if not np.isfinite(x).any():  # JSON that is complete can only end
                x[self._end_ids] = kept
        return x


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that is a function of its arguments (Philox 4x64)."""
    key = np.array([seed, choice], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))
    return float(generator.random())


def _candidates(
    x: NDArray[np.float64], params: SamplingParams
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Tokens to draw from and their weights: min_p, then top_k, then top_p.

    Args:
        x: (V,) scaled logits, the largest of them 0.
    """
    weights = np.exp(x)
    ids: NDArray[Any] = np.arange(len(x))
    if params.min_p:
        ids = np.flatnonzero(weights >= params.min_p)
    if params.top_k and params.top_k < len(ids):
        ids = _most_likely(weights, ids, params.top_k)
    if params.top_p < 1:
        total = weights[ids].sum()
        count = min(len(ids), _FIRST_LOOK)
        while True:
            first = _most_likely(weights, ids, count)
            reached = weights[first].cumsum()
            # The smallest set that reaches top_p: a token stays if those before it fall short.
            kept = int(np.searchsorted(reached, params.top_p * total, side="left")) + 1
            if kept <= count or count == len(ids):
                ids = first[:kept]
                break
            count = len(ids)
    return ids, weights[ids]


def _most_likely(weights: NDArray[np.float64], ids: NDArray[Any], count: int) -> NDArray[Any]:
    """The `count` ids of the largest weights, best first; among equals the lower id first."""
    own = weights[ids]
    if count < len(ids):
        least = np.partition(own, len(own) - count)[len(own) - count]
        above = ids[own > least]
        ids = np.concatenate([above, ids[own == least][: count - len(above)]])
        own = weights[ids]
    # Lower ids first, then stable by weight.
    order = np.lexsort((ids, -own))
    found: NDArray[Any] = ids[order]
    return found


def token_logprob(logits: Logits, token_id: int, top: int) -> TokenLogprob:
    """Log-probability of `token_id` under logits (V,), and the `top` most likely tokens."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    best = _most_likely(x, np.arange(len(x)), min(top, len(x))) if top else np.empty(0, np.int64)
    pairs = tuple((int(i), _rounded(x[i])) for i in best)
    return TokenLogprob(token_id, _rounded(x[token_id]), pairs)


def _rounded(logprob: float) -> float:
    return round(float(logprob), _DECIMALS) + 0.0  # never -0.0
