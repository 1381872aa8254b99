"""What goes into the engine and what comes out: plain dataclasses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from elastic_moe.errors import RequestError
from elastic_moe.routing.checks import as_index, shorten

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to end.

    Attributes:
        max_tokens: tokens to generate, at most.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: keep the most likely tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep this many of the most likely tokens; 0 keeps all.
        seed: with temperature > 0, the same seed gives the same tokens.
        stop: a text or texts that end the completion; its text ends before them.
        ignore_eos: go on after an end token.
        logprobs: report the log-probability of each token, and of this many most likely others;
            None reports nothing.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._take_integer("max_tokens", 1, math.inf, "an integer of at least 1")
        self._take_integer("top_k", 0, math.inf, "an integer of at least 0 (0 keeps all)")
        self._take_integer("seed", 0, 2**64 - 1, "an integer in [0, 2**64)")
        if self.logprobs is not None:
            self._take_integer("logprobs", 0, 20, "an integer in [0, 20], or None")
        hot = _is_number(self.temperature) and 0 <= self.temperature < math.inf
        self._check("temperature", hot, "a finite number of at least 0")
        self._check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        texts = isinstance(stop, Sequence) and all(isinstance(t, str) and t for t in stop)
        self._check("stop", texts, "a text or a list of texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))

    def _take_integer(self, field: str, low: float, high: float, allowed: str) -> None:
        """Check an integer; numpy's become Python's."""
        number = as_index(getattr(self, field))
        self._check(field, number is not None and low <= number <= high, allowed)
        object.__setattr__(self, field, number)

    def _check(self, field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise RequestError(f"{field} must be {allowed}, got {shorten(getattr(self, field))}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability, in nats and before temperature, of a chosen token and the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written, and when they came.

    Attributes:
        ttft_seconds: from the call to the first token.
        tpot_seconds: (end to end - TTFT) / (completion_tokens - 1); 0 for a single token.
    """

    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float
    tpot_seconds: float


@dataclass(frozen=True, slots=True)
class AppliedRouting:
    """The sub-network that ran, and what it cost.

    Attributes:
        name, fingerprint, depth, active_params: of the sub-network; see `elastic_moe.Subnet`.
        mean_experts: experts that really ran, per token and active MoE layer.
        flops_per_token: at the request's mean context, with the measured mean_experts.
    """

    name: str
    fingerprint: str
    depth: int
    active_params: int
    mean_experts: float
    flops_per_token: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    usage: Usage
    routing: AppliedRouting


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a generation; the last has the finish reason, and the whole in `completion`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
