"""One text being written: its tokens, its text so far, where it ends."""

from __future__ import annotations

from collections.abc import Collection

from elastic_moe.engine.outputs import Choice, Delta, FinishReason, TokenLogprob
from elastic_moe.engine.sampling import Logits, Sampler, token_logprob
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.model.tokenizer import Tokenizer


class Generation:
    """Takes a choice's tokens one by one and says what each means for the text.

    Args:
        index: which choice.
        end_ids: tokens that end it and are no text.
        forced_tokens: it ends after so many; None if nothing is forced.

    Attributes:
        token_ids: written so far.
        choice: the whole, once it has ended.
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
        self.index, self.sampler = index, sampler
        self.token_ids: list[int] = []
        self.choice: Choice | None = None
        self._tokenizer, self._params = tokenizer, params
        self._end_ids = end_ids if forced_tokens is None else ()
        self._stop = params.stop
        # Tokens after which it ends in any case, and how.
        self._last = params.max_tokens
        self._last_reason: FinishReason = "length"
        if forced_tokens is not None and forced_tokens <= params.max_tokens:
            self._last, self._last_reason = forced_tokens, "stop"
        self._stream = tokenizer.stream()
        self._logprobs: list[TokenLogprob] = []
        self._text = ""  # all text so far, up to and including a stop text
        self._sent = 0  # characters of it that left in deltas

    def take(self, logits: Logits | None, best_id: int) -> Delta:
        """Choose the next token; logits (V,) may be None if only the best was wanted."""
        token = self.sampler.choose(logits, best_id)
        told = None
        if self._params.logprobs is not None and logits is not None:
            told = (token_logprob(logits, token, self._params.logprobs),)
            self._logprobs += told
        self.token_ids.append(token)
        ended = token in self._end_ids
        if not ended:
            self._text += self._stream.step(token)
        stopped_at = self._find_stop() if self._stop else None
        reason: FinishReason | None = None
        if ended or stopped_at is not None or len(self.token_ids) == self._last:
            reason = "stop" if ended or stopped_at is not None else self._last_reason
            self._finish(reason, stopped_at, ended)
        end = len(self._text)
        if self._stop and reason is None:
            end -= self._held_back()
        text = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return Delta(text, (token,), reason, None, self.index, told)

    def _finish(self, reason: FinishReason, stopped_at: int | None, ended: bool) -> None:
        if stopped_at is not None:
            self._text = self._text[:stopped_at]
        elif not ended:  # bytes of an unfinished character become U+FFFD, as in decode
            self._text = self._tokenizer.decode(self.token_ids)
        logprobs = None if self._params.logprobs is None else tuple(self._logprobs)
        self.choice = Choice(self.index, self._text, tuple(self.token_ids), logprobs, reason)

    def _find_stop(self) -> int | None:
        """Where the earliest stop text begins, or None."""
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, self._sent - longest)
        found = [self._text.find(stop, search_from) for stop in self._stop]
        return min((at for at in found if at >= 0), default=None)

    def _held_back(self) -> int:
        """Characters at the end of the text that may turn out to begin a stop text."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )
