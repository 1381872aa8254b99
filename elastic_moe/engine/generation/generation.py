"""One choice being written: its tokens, where it ends, and its pieces on the way to a reader.

The engine's thread chooses tokens, for all requests between two steps of the model. Their text is
made where it is read, in the reader's thread; only stop texts must be looked for at once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from elastic_moe.engine.generation.detokenizer import TextWriter
from elastic_moe.engine.generation.sampler import Logits, Sampler, token_logprob
from elastic_moe.engine.outputs import (
    AppliedRouting,
    Choice,
    Completion,
    Delta,
    FinishReason,
    TokenLogprob,
    Usage,
)
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.model.text.tokenizer import Tokenizer


class Ending(NamedTuple):
    """A request's end."""

    generations: tuple[Generation, ...]
    usage: Usage
    routing: AppliedRouting
    prompt_logprobs: tuple[TokenLogprob, ...] | None

    def completion(self) -> Completion:
        """The whole, as its reader sees it."""
        choices = tuple(generation.choice() for generation in self.generations)
        first = choices[0]
        return Completion(
            text=first.text,
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            finish_reason=first.finish_reason,
            usage=self.usage,
            routing=self.routing,
            choices=choices,
            prompt_logprobs=self.prompt_logprobs,
        )


class Piece(NamedTuple):  # a tuple: one is made for every token
    """What a step gave a choice.

    Attributes:
        token_id: None if no token was asked for.
        text: None if it is not made yet.
        ending: in the very last piece of a request.
        prompt_logprobs: in its very first one.
    """

    generation: Generation
    token_id: int | None
    text: str | None
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None
    ending: Ending | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def delta(self) -> Delta:
        """As its reader sees it. Pieces of a choice are read once, in their order."""
        text, token = self.text, self.token_id
        if token is None:
            text = ""
        elif text is None:
            text = self.generation.write(token, self.finish_reason is not None)
        return Delta(
            text,
            () if token is None else (token,),
            self.finish_reason,
            None if self.ending is None else self.ending.completion(),
            self.generation.index,
            self.logprobs,
            self.prompt_logprobs,
        )


class Generation:
    """Takes a choice's tokens one by one and says what each means for the text.

    Args:
        index: which choice.
        end_ids: tokens that end it and are no text.
        forced_tokens: it ends after so many; None if nothing is forced.

    Attributes:
        token_ids: written so far.
        finish_reason: once it has ended.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        sampler: Sampler,
        index: int,
        end_ids: Collection[int],
        forced_tokens: int | None,
    ) -> None:
        self.index, self.sampler, self._params = index, sampler, params
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._end_ids = end_ids if forced_tokens is None else ()
        # Tokens after which it ends in any case, and how.
        self._last = params.max_tokens
        self._last_reason: FinishReason = "length"
        if forced_tokens is not None and forced_tokens <= params.max_tokens:
            self._last, self._last_reason = forced_tokens, "stop"
        self._writer = TextWriter(tokenizer, params.stop)
        self._stops = bool(params.stop)
        self._logprobs: list[TokenLogprob] = []
        self._finished = False  # its text

    def take(self, logits: Logits | None, best_id: int) -> Piece:
        """Choose the next token; logits (V,) may be None if only the best was wanted."""
        told: tuple[TokenLogprob, ...] | None = None
        if not self._last:  # the prompt was to be read, and nothing else
            self.finish_reason = self._last_reason
            told = None if self._params.logprobs is None else ()
            return Piece(self, None, None, self.finish_reason, told)
        token = self.sampler.choose(logits, best_id)
        if self._params.logprobs is not None and logits is not None:
            told = (token_logprob(logits, token, self._params.logprobs),)
            self._logprobs += told
        self.token_ids.append(token)
        last = len(self.token_ids) == self._last
        if token in self._end_ids:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = self._last_reason
        text = self.write(token, self.finish_reason is not None) if self._stops else None
        return Piece(self, token, text, self.finish_reason, told)

    def write(self, token: int, last: bool) -> str:
        """The text that may be read once this token has come, the last or not.

        A stop text makes it the last.
        """
        ended = token in self._end_ids
        text = "" if ended else self._writer.write(token)
        if self._writer.stopped:
            self.finish_reason, last = "stop", True
        return text + self._finish() if last else text

    def choice(self) -> Choice:
        """The whole, once it has ended."""
        assert self.finish_reason is not None
        if not self._finished:
            self._finish()
        return Choice(
            self.index,
            self._writer.text,
            tuple(self.token_ids),
            None if self._params.logprobs is None else tuple(self._logprobs),
            self.finish_reason,
        )

    def _finish(self) -> str:
        """What is left of the text."""
        self._finished = True
        ended = bool(self.token_ids) and self.token_ids[-1] in self._end_ids
        return self._writer.finish(self.token_ids[:-1] if ended else self.token_ids)
