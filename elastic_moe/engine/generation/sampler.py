"""Choosing the next token of every sequence of a step, from its logits.

`elastic_moe_kernels.ops.sample` does the arithmetic: what runs beside a sequence changes no token
of it. A `Sampler` holds what belongs to one sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from elastic_moe_kernels import native
from elastic_moe_kernels.ops import sample, token_logprobs
from elastic_moe_kernels.ops.sample import sample_native
from elastic_moe_kernels.ops.sample_reference import (
    LOGIT_CHANGE,
    SAMPLING_ROW,
    Changes,
    Masks,
    new_rows,
)
from numpy.typing import NDArray

from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.engine.running.runner import LogitsMode
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.errors import RequestError

Logits = NDArray[np.float32]
Mask = NDArray[np.uint32]
_LEAST = 5e-324  # of what must be above 0
_MOST_TOP_K = 2**31 - 1
# Of log-probabilities. Float32 logits, which they come from, have no more; and the last bits of a
# logarithm differ from one processor's library to the next.
_DECIMALS = 7


class Grammar(Protocol):
    """Which tokens structured output allows next."""

    def allowed(self) -> Mask:
        """(ceil(V / 32),) a bit for each token that may come; an end token where the text may end.

        Bit i of word j is that of token 32j + i.
        """

    def accept(self, token: int) -> None:
        """Advance by a token that was sampled."""


class Sampler:
    """How the tokens of one choice are drawn, in their order.

    Args:
        prompt: token ids, for the repetition penalty.
        choice: its index.
        end_ids: tokens that end a text.
        vocab_size: V of the model.
        grammar: of structured output.
        forced: the tokens that must come.

    Attributes:
        logits_mode: what it needs of the model: 'best' or 'last'.
        row: the bytes of its `SAMPLING_ROW`, but for the position.
        position: tokens that were accepted.
        changes: what penalties and biases do to logits; None if nothing.
        mask: which tokens may come next; None for all.
        logprobs: how many of the most likely tokens to report; None for no log-probabilities.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        choice: int,
        end_ids: Collection[int],
        vocab_size: int,
        *,
        grammar: Grammar | None = None,
        forced: Sequence[int] | None = None,
    ) -> None:
        self._grammar, self._forced = grammar, forced
        self._min_tokens, self.logprobs = params.min_tokens, params.logprobs
        self.position = 0
        row = new_rows(1)
        row["temperature"] = params.temperature
        row["top_p"] = max(float(params.top_p), _LEAST)
        row["min_p"] = params.min_p
        row["repetition_penalty"] = max(float(params.repetition_penalty), _LEAST)
        row["frequency_penalty"] = params.frequency_penalty
        row["presence_penalty"] = params.presence_penalty
        row["top_k"] = min(params.top_k, _MOST_TOP_K)
        row["seed"], row["choice"] = params.seed, choice
        self.row = row.tobytes()
        repeated = params.repetition_penalty != 1
        self._penalised = repeated or bool(params.frequency_penalty or params.presence_penalty)
        self.changes: LogitChanges | None = None
        if self._penalised or params.logit_bias:
            self.changes = LogitChanges(prompt if repeated else (), params.logit_bias or {})
        self.mask: Mask | None = None
        self._no_ends: Mask | None = None
        if params.min_tokens:
            self._no_ends = _all_but(end_ids, vocab_size)
        plain = self.changes is None and grammar is None and not params.min_tokens
        # Whether the most likely token, or a forced one, is enough.
        self._by_best = (plain and params.temperature == 0) or forced is not None
        self.logits_mode: LogitsMode = (
            "best" if self._by_best and params.logprobs is None else "last"
        )

    def known_token(self, best_id: int) -> int | None:
        """The next token, where nothing is to be drawn for it; None elsewhere."""
        if not self._by_best:
            return None
        return best_id if self._forced is None else self._forced[self.position]

    def update_mask(self) -> None:
        """Find out which tokens may come next.

        Raises:
            RequestError: the grammar cannot be followed.
        """
        if self._by_best:
            return
        mask = None if self._grammar is None else self._grammar.allowed()
        if self._no_ends is not None and self.position < self._min_tokens:
            later = self._no_ends if mask is None else mask & self._no_ends
            if later.any():  # JSON that is complete can only end
                mask = later
        self.mask = mask

    def accept(self, token: int) -> None:
        """Go on after a token.

        Raises:
            RequestError: no token may come, or the grammar cannot be followed.
        """
        if token < 0:
            raise RequestError("no token may come next: the grammar and min_tokens forbid all.")
        if not self._by_best:
            if self._penalised and self.changes is not None:
                self.changes.count(token)
            if self._grammar is not None:
                self._grammar.accept(token)
        self.position += 1


class LogitChanges:
    """What penalties and biases do to the logits of one sequence: an entry for each such token.

    Args:
        prompt: tokens that count as seen.
        bias: token id -> what is added to its logit.
    """

    def __init__(self, prompt: Sequence[int], bias: Any) -> None:
        tokens = dict.fromkeys((*prompt, *bias))
        self._index = {token: i for i, token in enumerate(tokens)}
        self._entries = np.zeros(len(tokens) + 16, LOGIT_CHANGE)
        own = self.entries
        own["token"] = list(tokens)
        own["bias"] = [bias.get(token, 0.0) for token in tokens]
        own["seen"][[self._index[token] for token in dict.fromkeys(prompt)]] = 1

    @property
    def entries(self) -> NDArray[np.void]:
        """(N,) `LOGIT_CHANGE`."""
        return self._entries[: len(self._index)]

    def count(self, token: int) -> None:
        """Count a token that was generated."""
        at = self._index.setdefault(token, len(self._index))
        if at == len(self._entries):
            self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
        entry = self._entries[at]
        entry["token"], entry["seen"] = token, 1
        entry["count"] += 1


def choose_tokens(
    samplers: Sequence[Sampler],
    logits: Logits | None,
    logits_rows: Sequence[int],
    best_ids: Sequence[int],
    threads: int = 1,
) -> list[tuple[int, TokenLogprob | None]]:
    """The next token of each sampler, with its log-probability if that was asked for.

    Args:
        samplers: after their `update_mask`.
        logits: (n, V), or None if no `logits_mode` is 'last'.
        logits_rows: whose logits are each sampler's, in [0, n).
        best_ids: the most likely token of each.

    Returns:
        Tokens, -1 where none may come.
    """
    known = [s.known_token(best) for s, best in zip(samplers, best_ids, strict=True)]
    if logits is None:
        return [(-1 if token is None else token, None) for token in known]
    tokens = _draw(samplers, logits, logits_rows, known, threads)
    logprobs: list[TokenLogprob | None] = [None] * len(tokens)
    wanted = [
        (i, logits_rows[i], tokens[i], sampler.logprobs)
        for i, sampler in enumerate(samplers)
        if sampler.logprobs is not None and tokens[i] >= 0
    ]
    if wanted:
        places, rows, chosen, tops = zip(*wanted, strict=True)
        found = describe_tokens(logits, rows, chosen, tops, threads)
        for i, logprob in zip(places, found, strict=True):
            logprobs[i] = logprob
    return list(zip(tokens, logprobs, strict=True))


def _draw(
    samplers: Sequence[Sampler],
    logits: Logits,
    logits_rows: Sequence[int],
    known: Sequence[int | None],
    threads: int,
) -> list[int]:
    """`known` with the missing tokens."""
    places = [i for i, token in enumerate(known) if token is None]
    drawn: list[int] = []
    if places:
        drawing = [samplers[i] for i in places]
        rows = _join([sampler.row for sampler in drawing], SAMPLING_ROW)
        rows["position"] = [sampler.position for sampler in drawing]
        own = np.array([logits_rows[i] for i in places], np.int32)
        changes, masks = _changes_of(drawing), _masks_of(drawing)
        if native.missing():
            drawn = sample(logits, rows, logits_rows=own, changes=changes, masks=masks).tolist()
        else:  # without the op's own checks, which would take as long as to draw
            drawn = sample_native(logits, rows, own, changes, masks, threads=threads).tolist()
    missing = iter(drawn)
    return [next(missing) if token is None else token for token in known]


def describe_tokens(
    logits: Logits,
    logits_rows: Sequence[int],
    tokens: Sequence[int],
    tops: Sequence[int],
    threads: int = 1,
) -> list[TokenLogprob]:
    """The log-probability of each token, and of the `tops` most likely ones beside it.

    Args:
        logits: (n, V).
        logits_rows: whose logits are each token's, in [0, n).
    """
    found = token_logprobs(
        logits,
        np.array(tokens, np.int32),
        min(max(tops, default=0), logits.shape[1]),
        logits_rows=np.array(logits_rows, np.int32),
        threads=threads,
    )
    return [
        TokenLogprob(
            token,
            _rounded(own),
            tuple((i, _rounded(x)) for i, x in zip(ids[:top], values[:top], strict=True)),
        )
        for token, top, own, ids, values in zip(
            tokens,
            tops,
            found.logprobs.tolist(),
            found.top_ids.tolist(),
            found.top_logprobs.tolist(),
            strict=True,
        )
    ]


def _changes_of(samplers: Sequence[Sampler]) -> Changes | None:
    if all(sampler.changes is None for sampler in samplers):
        return None
    own = [b"" if s.changes is None else s.changes.entries.tobytes() for s in samplers]
    ends = np.cumsum([len(one) // LOGIT_CHANGE.itemsize for one in own], dtype=np.int64)
    return Changes(_join(own, LOGIT_CHANGE), ends)


def _join(records: Sequence[bytes], dtype: np.dtype[Any]) -> NDArray[np.void]:
    """Records one after the other. numpy's concatenate takes long to compare their fields."""
    joined: NDArray[np.void] = np.frombuffer(bytearray(b"".join(records)), dtype)
    return joined


def _masks_of(samplers: Sequence[Sampler]) -> Masks | None:
    bits = [sampler.mask for sampler in samplers if sampler.mask is not None]
    if not bits:
        return None
    masked = np.array([sampler.mask is not None for sampler in samplers])
    rows = np.where(masked, np.cumsum(masked, dtype=np.int32) - 1, -1)
    return Masks(np.stack(bits), rows.astype(np.int32))


def _all_but(forbidden: Collection[int], vocab_size: int) -> Mask:
    """A mask of V tokens without these."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[:vocab_size] = 1
    bits[list(forbidden)] = 0
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _rounded(logprob: float) -> float:
    return round(logprob, _DECIMALS) + 0.0  # never -0.0
