"""`SamplingParams`: how tokens are chosen and when a text ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from elastic_moe.errors import RequestError
from elastic_moe.routing.checks import as_index, shorten

MAX_CHOICES = 128
_TOKEN_IDS = "a list of token ids"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to end.

    Logits go through, in this order: repetition, frequency and presence penalty; logit_bias; what
    may not come (ends before min_tokens, what JSON forbids); temperature; min_p; top_k; top_p.

    Attributes:
        max_tokens: tokens to generate, at most; 0 only reads the prompt.
        n: choices; all share the prompt's work.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: keep the most likely tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep this many of the most likely tokens; 0 keeps all.
        min_p: keep tokens at least this many times as likely as the best; 0 keeps all.
        repetition_penalty: positive logits of tokens seen in prompt or text are divided by it,
            negative ones multiplied; 1 changes nothing.
        frequency_penalty, presence_penalty: taken from the logit of a generated token, for each
            time it came, and once.
        logit_bias: token id -> what is added to its logit; -100 all but forbids it.
        seed: with temperature > 0, the same seed gives the same tokens, whatever runs beside it:
            a draw depends on the seed, the choice's index and the position alone.
        stop: a text or texts that end the completion; its text ends before them.
        stop_token_ids: tokens that end the completion, as an end token does.
        min_tokens: no end token before so many tokens.
        ignore_eos: go on after an end token.
        logprobs: report the log-probability of each token, and of this many most likely others;
            None reports nothing. They are of the model's own logits, before all of the above.
        prompt_logprobs: the same for the prompt's tokens after the first.
        json_schema: the text must be JSON that this schema allows: a JSON text or a mapping.
        json_object: the text must be a JSON object.
        forced_text: what must be "generated", as text or token ids, token by token, with the
            model's own log-probabilities; it ends with finish_reason 'stop'.
        shown_token_ids: special tokens that the text has, as it has all others: those that mark
            a call of a tool, for instance.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    json_object: bool = False
    forced_text: str | Sequence[int] | None = None
    shown_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._take_integer("max_tokens", 0, math.inf, "an integer of at least 0")
        self._take_integer("min_tokens", 0, math.inf, "an integer of at least 0")
        self._take_integer("n", 1, MAX_CHOICES, f"an integer in [1, {MAX_CHOICES}]")
        self._take_integer("top_k", 0, math.inf, "an integer of at least 0 (0 keeps all)")
        self._take_integer("seed", 0, 2**64 - 1, "an integer in [0, 2**64)")
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                self._take_integer(field, 0, 20, "an integer in [0, 20], or None")
        hot = _is_number(self.temperature) and 0 <= self.temperature < math.inf
        self._check("temperature", hot, "a finite number of at least 0")
        self._check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        self._check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        penalty = _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf
        self._check("repetition_penalty", penalty, "a finite number above 0")
        for field in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, field)
            self._check(field, _is_number(value) and -2 <= value <= 2, "a number in [-2, 2]")
        for field in ("ignore_eos", "json_object"):
            self._check(field, isinstance(getattr(self, field), bool), "True or False")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        texts = isinstance(stop, Sequence) and all(isinstance(t, str) and t for t in stop)
        self._check("stop", texts, "a text or a list of texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))
        self._take_ids("stop_token_ids")
        self._take_ids("shown_token_ids")
        self._take_bias()
        self._take_schema()
        if self.forced_text is not None and not isinstance(self.forced_text, str):
            self._take_ids("forced_text")
        self._check_together()

    def _take_bias(self) -> None:
        if self.logit_bias is None:
            return
        allowed = "token ids with numbers in [-100, 100]"
        self._check("logit_bias", isinstance(self.logit_bias, Mapping), allowed)
        taken: dict[int, float] = {}
        for key, value in self.logit_bias.items():
            token = as_index(key)
            fine = token is not None and token >= 0 and _is_number(value) and abs(value) <= 100
            self._check("logit_bias", fine, allowed)
            if token is not None:
                taken[token] = float(value)
        object.__setattr__(self, "logit_bias", taken or None)

    def _take_schema(self) -> None:
        schema = self.json_schema
        if schema is None:
            return
        allowed = "a JSON schema: a JSON text or a mapping"
        try:
            read = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        except (TypeError, ValueError, RecursionError):
            read = None
        self._check("json_schema", isinstance(read, (dict, bool)), allowed)
        object.__setattr__(self, "json_schema", json.dumps(read))

    def _check_together(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens, got {self.min_tokens} and "
                f"{self.max_tokens}."
            )
        wanted = [
            field
            for field, given in (
                ("json_schema", self.json_schema is not None),
                ("json_object", self.json_object),
                ("forced_text", self.forced_text is not None),
            )
            if given
        ]
        if len(wanted) > 1:
            raise RequestError(f"{' and '.join(wanted)} say different things. Give one of them.")
        if self.ignore_eos and (self.json_schema is not None or self.json_object):
            raise RequestError(
                "ignore_eos and JSON say different things: JSON ends when it is whole."
            )
        if self.forced_text is not None and not self.forced_text:
            raise RequestError("forced_text must have at least one token.")
        if self.forced_text is not None and self.n > 1:
            raise RequestError(
                f"n must be 1 with forced_text, got {self.n}: all would be the same."
            )

    def _take_integer(self, field: str, low: float, high: float, allowed: str) -> None:
        """Check an integer; numpy's become Python's."""
        number = as_index(getattr(self, field))
        self._check(field, number is not None and low <= number <= high, allowed)
        object.__setattr__(self, field, number)

    def _take_ids(self, field: str) -> None:
        value = getattr(self, field)
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        self._check(field, listed, _TOKEN_IDS)
        ids = [as_index(token) for token in value]
        self._check(field, all(token is not None and token >= 0 for token in ids), _TOKEN_IDS)
        object.__setattr__(self, field, tuple(ids))

    def _check(self, field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise RequestError(f"{field} must be {allowed}, got {shorten(getattr(self, field))}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
