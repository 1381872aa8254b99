"""A request and its sequences: all that the engine knows of one prompt, in one place.

A `Request` is one prompt of a user's call. It has a `Sequence` for each of its n choices. The
engine's thread appends tokens, the scheduler sets `num_computed_tokens`, the block manager owns
`block_table`, and the runner reads. Text is decoded in the thread that reads it, from a
`SequenceOutput`; only stop texts are searched by the engine's thread.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

from elastic_moe_kernels.constants import BLOCK_POSITIONS

from elastic_moe.engine.generation.detokenizer import Detokenizer
from elastic_moe.engine.generation.sampler import Logits, Sampler, describe_tokens
from elastic_moe.engine.outputs import (
    Choice,
    Completion,
    Delta,
    FinishReason,
    RoutingStats,
    TokenLogprob,
    Usage,
)
from elastic_moe.engine.running.paged import PagedSequence
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.routing import Subnet


class OutputQueue(Protocol):
    """Where the outputs of a call go, from the engine's thread. No call may raise or block."""

    @property
    def final_only(self) -> bool:
        """Whether only the last output of each request is wanted."""

    @property
    def put(self) -> Callable[[SequenceOutput], None]:
        """Add an output; its reader may wake only at the next flush."""

    @property
    def flush(self) -> Callable[[], None]:
        """Wake the reader."""

    @property
    def fail(self) -> Callable[[BaseException], None]:
        """Add an error, which is the end of the call, and wake the reader."""


class SequenceOutput(NamedTuple):  # a tuple: one is made for every token
    """What a step gave a sequence.

    Attributes:
        token_id: None if max_tokens is 0.
        text: None if it is not decoded yet.
        request_finished: whether it is the last output of its request.
        prompt_logprobs: in the first output of a request, if asked for.
    """

    sequence: Sequence
    token_id: int | None
    text: str | None
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None
    request_finished: bool = False
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def delta(self) -> Delta:
        """As the caller gets it. Outputs of a sequence are read once, in their order."""
        sequence, token, text = self.sequence, self.token_id, self.text
        if token is None:
            text = ""
        elif text is None:
            text = sequence.decode_token(token, self.finish_reason is not None)
        return Delta(
            text,
            () if token is None else (token,),
            self.finish_reason,
            sequence.request.completion() if self.request_finished else None,
            sequence.index,
            self.logprobs,
            self.prompt_logprobs,
            sequence.request.prompt_index,
        )


class Sequence(PagedSequence):
    """One choice of a request; made by `Request.add_sequence`.

    Args:
        end_ids: tokens that end it and are no text.
        num_forced_tokens: it ends after so many; None if nothing is forced.

    Attributes:
        index: which choice.
        token_ids: the prompt, and the output.
        parent: the first choice, which computes the prompt for all; None for itself.
        prompt_computed: whether its prompt was computed once, or never will be.
        reads_cache: whether it may start from cached prefixes; logits of the prompt are not cached.
        num_cached_tokens: of the prompt, found in the prefix cache at first; None before.
        num_published_pages: pages that joined the prefix cache, or were there already.
        finish_reason: once it has ended.
    """

    __slots__ = (
        "_digest",
        "_end_ids",
        "_keys",
        "_last_reason",
        "_logprobs",
        "_max_length",
        "_text_finished",
        "detokenizer",
        "finish_reason",
        "index",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_published_pages",
        "parent",
        "prompt_computed",
        "reads_cache",
        "request",
        "sampler",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        sampler: Sampler,
        detokenizer: Detokenizer,
        end_ids: Collection[int] = (),
        num_forced_tokens: int | None = None,
    ) -> None:
        params, prompt = request.params, request.prompt_token_ids
        super().__init__(request.subnet, len(prompt) + params.max_tokens)
        self.request, self.index = request, len(request.sequences)
        self.sampler, self.detokenizer = sampler, detokenizer
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.parent = request.sequences[0] if request.sequences else None
        self.prompt_computed = False
        self.reads_cache = params.prompt_logprobs is None or self.parent is not None
        self.num_cached_tokens: int | None = None
        self.num_published_pages = 0
        self.finish_reason: FinishReason | None = None
        self._end_ids = end_ids if num_forced_tokens is None else ()
        # Tokens after which it ends in any case, and how.
        new_tokens = params.max_tokens
        self._last_reason: FinishReason = "length"
        if num_forced_tokens is not None and num_forced_tokens <= new_tokens:
            new_tokens, self._last_reason = num_forced_tokens, "stop"
        self._max_length = len(prompt) + new_tokens
        self._logprobs: list[TokenLogprob] = []
        self._text_finished = False
        self._keys: list[bytes] = []
        self._digest: Any = hashlib.sha256(b"elastic-moe tokens 1\0")

    @property
    def arrival(self) -> tuple[int, int]:
        """(request's number, choice), its place in the order of service; unique."""
        return self.request.number, self.index

    @property
    def num_new_tokens(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def waits_for_prompt(self) -> bool:
        """Whether the first choice still has the prompt to compute."""
        return self.parent is not None and not self.parent.prompt_computed

    def tokens_keys(self, pages: int) -> list[bytes]:
        """For each of the first pages, a digest of all tokens up to its end."""
        for page in range(len(self._keys), pages):
            own = self.token_ids[page * BLOCK_POSITIONS : (page + 1) * BLOCK_POSITIONS]
            self._digest.update(array("i", own))
            self._keys.append(self._digest.digest())
        return self._keys[:pages]

    @property
    def wants_token(self) -> bool:
        """Whether tokens follow the prompt."""
        return self._max_length > self.num_prompt_tokens

    def finish_prompt(self) -> SequenceOutput:
        """End: the prompt alone was asked for."""
        self.finish_reason = self._last_reason
        logprobs = None if self.request.params.logprobs is None else ()
        return SequenceOutput(self, None, None, self.finish_reason, logprobs)

    def append(self, token: int, logprob: TokenLogprob | None = None) -> SequenceOutput:
        """Append the next token, with its log-probability if that was asked for."""
        params = self.request.params
        self.sampler.accept(token)
        logprobs = None if logprob is None else (logprob,)
        self._logprobs += logprobs or ()
        self.token_ids.append(token)
        if token in self._end_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_length:
            self.finish_reason = self._last_reason
        text = None
        if params.stop:
            text = self.decode_token(token, self.finish_reason is not None)
        return SequenceOutput(self, token, text, self.finish_reason, logprobs)

    def decode_token(self, token: int, last: bool) -> str:
        """The text that may be streamed now that this token has come, the last or not.

        A stop text makes it the last.
        """
        ended = token in self._end_ids
        text = "" if ended else self.detokenizer.add(token)
        if self.detokenizer.stopped:
            self.finish_reason, last = "stop", True
        return text + self._finish_text() if last else text

    def choice(self) -> Choice:
        """The whole, once it has ended."""
        assert self.finish_reason is not None
        if not self._text_finished:
            self._finish_text()
        return Choice(
            self.index,
            self.detokenizer.text,
            tuple(self.token_ids[self.num_prompt_tokens :]),
            None if self.request.params.logprobs is None else tuple(self._logprobs),
            self.finish_reason,
        )

    def _finish_text(self) -> str:
        """The rest of the text."""
        self._text_finished = True
        output = self.token_ids[self.num_prompt_tokens :]
        ended = bool(output) and output[-1] in self._end_ids
        return self.detokenizer.finish(output[:-1] if ended else output)


class Request:
    """One prompt of a user's call.

    Args:
        outputs: where its outputs go.
        prompt_index: which prompt of the call it is.

    Attributes:
        number: in the order in which requests enter the queue, which is the order of service.
        sequences: its choices.
        finished: nothing of it runs any more.
        arrival_time, scheduled_time, first_token_time, last_token_time: of its making, its first
            step, its first token and the first choice's last; seconds of a clock, 0 before.
    """

    def __init__(
        self,
        prompt_token_ids: list[int],
        subnet: Subnet,
        params: SamplingParams,
        outputs: OutputQueue,
        prompt_index: int = 0,
    ) -> None:
        self.number, self.prompt_index = -1, prompt_index
        self.prompt_token_ids, self.subnet, self.params = prompt_token_ids, subnet, params
        self.outputs = outputs
        self.sequences: list[Sequence] = []
        self.finished = False
        self._computed_tokens = self._experts_run = 0
        self._prompt_logprobs: list[TokenLogprob] = []
        self.arrival_time = time.perf_counter()
        self.scheduled_time = self.first_token_time = self.last_token_time = 0.0

    def add_sequence(
        self,
        sampler: Sampler,
        detokenizer: Detokenizer,
        end_ids: Collection[int] = (),
        num_forced_tokens: int | None = None,
    ) -> Sequence:
        """Add a choice; arguments as of `Sequence`."""
        sequence = Sequence(self, sampler, detokenizer, end_ids, num_forced_tokens)
        self.sequences.append(sequence)
        return sequence

    @property
    def all_sequences_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Of the prompt's tokens after the first, once they are computed; None if not asked for."""
        return None if self.params.prompt_logprobs is None else tuple(self._prompt_logprobs)

    def count(self, tokens: int, experts_run: int) -> None:
        """Add tokens that ran, and the (token, expert) pairs that ran for them."""
        self._computed_tokens += tokens
        self._experts_run += experts_run

    def add_prompt_logits(self, start: int, logits: Logits | None, threads: int) -> None:
        """Logits (n, V) of the prompt's tokens from `start` on; again after a preemption."""
        top, prompt = self.params.prompt_logprobs, self.prompt_token_ids
        if top is None or logits is None:
            return
        known = len(self._prompt_logprobs)
        rows = range(known - start, min(len(logits), len(prompt) - 1 - start))
        tokens = [prompt[start + row + 1] for row in rows]
        self._prompt_logprobs += describe_tokens(logits, rows, tokens, [top] * len(rows), threads)

    def completion(self) -> Completion:
        """The whole, once all choices have ended."""
        choices = tuple(sequence.choice() for sequence in self.sequences)
        first = choices[0]
        prompt_tokens, written = len(self.prompt_token_ids), len(first.token_ids)
        decode_seconds = self.last_token_time - self.first_token_time
        return Completion(
            text=first.text,
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            finish_reason=first.finish_reason,
            usage=Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=sum(len(choice.token_ids) for choice in choices),
                ttft_seconds=self.first_token_time - self.arrival_time,
                tpot_seconds=decode_seconds / (written - 1) if written > 1 else 0.0,
                cached_tokens=self.sequences[0].num_cached_tokens or 0,
                queue_seconds=self.scheduled_time - self.arrival_time,
            ),
            routing=RoutingStats.of(
                self.subnet,
                self._computed_tokens,
                self._experts_run,
                (prompt_tokens + written) // 2,
            ),
            choices=choices,
            prompt_logprobs=self.prompt_logprobs,
        )
