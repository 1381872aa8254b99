"""A request on its way through the engine, with its choices; used on the engine's thread alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from elastic_moe.engine.generation.generation import Ending, Generation, Piece
from elastic_moe.engine.generation.sampler import Logits, token_logprob
from elastic_moe.engine.outputs import AppliedRouting, TokenLogprob, Usage
from elastic_moe.engine.running.paged import ManagedSequence
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.engine.sequence import Sequence
from elastic_moe.routing import Subnet


class Sink(Protocol):
    """Where the pieces of a request go. No call may raise or block."""

    @property
    def whole(self) -> bool:
        """Whether only the very last piece is wanted."""

    @property
    def put(self) -> Callable[[Piece], None]:
        """Takes the next piece; its reader may learn of it with the next flush only."""

    @property
    def flush(self) -> Callable[[], None]:
        """Has the reader learn of what was put."""

    @property
    def fail(self) -> Callable[[BaseException], None]:
        """Is told why there will be no more; the reader learns of it at once."""


class Text:
    """One choice: what the scheduler, the runner and the reader know of it."""

    __slots__ = ("fresh", "generation", "job", "sequence", "state", "tells_prompt")

    def __init__(
        self, job: Job, sequence: Sequence, state: ManagedSequence, generation: Generation
    ) -> None:
        self.job, self.sequence, self.state, self.generation = job, sequence, state, generation
        self.fresh = True  # its pages are others than the runner's tables say
        # Whether the logits of its prompt are asked for.
        self.tells_prompt = job.params.prompt_logprobs is not None and not job.texts


class Job:
    """One request.

    Args:
        number: unique; requests are served in this order.
        prompt: token ids.

    Attributes:
        texts: its choices.
        ended: nothing of it runs any more.
        first_run, first_token, first_end: when it first took part in a step, when the first token
            came, and when the first choice ended; 0 before.
    """

    def __init__(
        self, number: int, prompt: list[int], subnet: Subnet, params: SamplingParams, sink: Sink
    ) -> None:
        self.number, self.prompt, self.subnet = number, prompt, subnet
        self.params, self.sink = params, sink
        self.texts: list[Text] = []
        self.ended = False
        self._rows = self._experts = 0
        self._prompt_logprobs: list[TokenLogprob] = []
        self._started = time.perf_counter()
        self.first_run = self.first_token = self.first_end = 0.0

    def add_text(
        self,
        generation: Generation,
        open_state: Callable[[Subnet, int], ManagedSequence],
    ) -> None:
        """Have another choice, which begins when the first one has computed the prompt."""
        first = self.texts[0].sequence if self.texts else None
        sequence = Sequence(
            (self.number, len(self.texts)), self.prompt, self.subnet.kv_keys, after=first
        )
        state = open_state(self.subnet, len(self.prompt) + self.params.max_tokens)
        text = Text(self, sequence, state, generation)
        sequence.reads_cache = not text.tells_prompt  # logits of the prompt are not cached
        self.texts.append(text)

    @property
    def finished(self) -> bool:
        """Whether all choices have come to their end."""
        return all(text.generation.finish_reason is not None for text in self.texts)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Of the prompt's tokens after the first, once they are computed; None if nobody asked."""
        return None if self.params.prompt_logprobs is None else tuple(self._prompt_logprobs)

    def count(self, rows: int, experts: int) -> None:
        """Tokens that ran, and (token, expert) pairs that ran for them."""
        self._rows += rows
        self._experts += experts

    def take_prompt_logits(self, start: int, logits: Logits | None) -> None:
        """Logits (n, V) of the prompt's tokens from `start` on; again after a preemption."""
        top = self.params.prompt_logprobs
        if top is None or logits is None:
            return
        for position, row in enumerate(logits[: len(self.prompt) - 1 - start], start + 1):
            if position == len(self._prompt_logprobs) + 1:
                self._prompt_logprobs.append(token_logprob(row, self.prompt[position], top))

    def ending(self) -> Ending:
        """What there is to say when all choices have ended."""
        generations = tuple(text.generation for text in self.texts)
        written = len(generations[0].token_ids)
        mean_context = (len(self.prompt) + written) // 2
        routing = AppliedRouting.of(self.subnet, self._rows, self._experts, mean_context)
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=sum(len(generation.token_ids) for generation in generations),
            ttft_seconds=self.first_token - self._started,
            tpot_seconds=(self.first_end - self.first_token) / (written - 1)
            if written > 1
            else 0.0,
            cached_tokens=self.texts[0].sequence.cached_tokens or 0,
            queue_seconds=self.first_run - self._started,
        )
        return Ending(generations, usage, routing, self.prompt_logprobs)
