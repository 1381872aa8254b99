"""Completions, their pieces, and embeddings, as callers get them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_moe.routing import Subnet

FinishReason = Literal["stop", "length"]


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
        completion_tokens: of all choices.
        ttft_seconds: from the call to the first token.
        tpot_seconds: (end to end - TTFT) / (tokens - 1) of the first choice; 0 for a single token.
        cached_tokens: of the prompt, those whose keys and values were there already.
        queue_seconds: from the call to the first step that it took part in.
    """

    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float
    tpot_seconds: float
    cached_tokens: int = 0
    queue_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RoutingStats:
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

    @classmethod
    def of(cls, subnet: Subnet, tokens: int, experts: int, mean_context: int) -> RoutingStats:
        """What it cost to run so many tokens, and (token, expert) pairs for them."""
        active = len(subnet.shape.moe_layers.intersection(subnet.active_layers))
        mean_experts = experts / (tokens * active) if active else 0.0
        return cls(
            name=subnet.name,
            fingerprint=subnet.fingerprint,
            depth=subnet.depth,
            active_params=subnet.active_params,
            mean_experts=mean_experts,
            flops_per_token=subnet.flops_per_token(mean_context, mean_experts),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a request's texts."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    Attributes:
        text, token_ids, logprobs, finish_reason: of the first choice.
        choices: all of them.
        prompt_logprobs: of the prompt's tokens after the first, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    usage: Usage
    routing: RoutingStats
    choices: tuple[Choice, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


class Delta(NamedTuple):  # a tuple: one is made for every token
    """A piece of a generation.

    Attributes:
        text: may be empty: a character is not whole yet, or a stop text may have begun.
        token_ids: of this piece; none if max_tokens is 0.
        finish_reason: in the last piece of a choice.
        completion: in the last piece of a prompt: the whole.
        choice: which one it belongs to.
        logprobs: of the tokens, if asked for.
        prompt_logprobs: in the first piece of a prompt: of its tokens, if asked for.
        prompt: which prompt of a list it belongs to.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    prompt: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A text as a vector.

    Attributes:
        vector: (D,) float32 of length 1: the mean of the final states of all tokens.
        prompt_tokens: how many they were.
    """

    vector: NDArray[np.float32]
    prompt_tokens: int
    routing: RoutingStats
