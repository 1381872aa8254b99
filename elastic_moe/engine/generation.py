"""One sequence being generated: its cache, its tokens, its text."""

from __future__ import annotations

import time
from collections.abc import Sequence

from elastic_moe.engine.request import (
    AppliedRouting,
    Completion,
    Delta,
    FinishReason,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from elastic_moe.engine.runner import Chunk, Runner, StepOutput, Wanted
from elastic_moe.engine.sampling import choose_token, token_logprob
from elastic_moe.errors import EngineError
from elastic_moe.model.tokenizer import Tokenizer
from elastic_moe.routing import Subnet

PREFILL_CHUNK = 2048  # tokens of a prompt that one step takes: bounds the memory of a step


def chunks(token_ids: Sequence[int]) -> list[Sequence[int]]:
    """Cut a prompt into what one step takes."""
    return [
        token_ids[start : start + PREFILL_CHUNK]
        for start in range(0, len(token_ids), PREFILL_CHUNK)
    ]


class Generation:
    """Generates one completion; each `step` runs the model once and returns the new text.

    Args:
        prompt: token ids.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        subnet: Subnet,
        sampling: SamplingParams,
    ) -> None:
        self._runner, self._tokenizer = runner, tokenizer
        self._subnet, self._sampling = subnet, sampling
        self._greedy = sampling.temperature == 0 and sampling.logprobs is None
        self._input = list(prompt)
        self._prompt_tokens = len(prompt)
        self._sequence = runner.open(subnet, len(prompt) + sampling.max_tokens)
        self._stream = tokenizer.stream()
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text = ""  # all text so far, up to and including a stop text
        self._sent = 0  # characters of it that left in deltas
        self._experts_run = self._rows_routed = self._rows = 0
        self._started = time.perf_counter()
        self._first_token = 0.0

    def step(self) -> Delta:
        """Generate one token."""
        token_ids: Sequence[int] = self._input
        if len(token_ids) > PREFILL_CHUNK:
            *earlier, token_ids = chunks(token_ids)
            for part in earlier:
                self._run(part, "none")
        out = self._run(token_ids, "best" if self._greedy else "last")
        if not out.finite:
            raise EngineError(
                f"the logits after {self._sequence.length} tokens are not numbers: weights or keys "
                f"of config.json are so large or small that a sum overflows. Fetch or convert the "
                f"checkpoint again."
            )
        if self._greedy:
            return self._take_token(out.best_ids[0])
        sampling, logits = self._sampling, out.logits[0]
        token = choose_token(logits, sampling, len(self._token_ids))
        if sampling.logprobs is not None:
            self._logprobs.append(token_logprob(logits, token, sampling.logprobs))
        return self._take_token(token)

    def _run(self, token_ids: Sequence[int], wanted: Wanted) -> StepOutput:
        """Run the next tokens."""
        out = self._runner.run((Chunk(self._sequence, token_ids, wanted),))
        self._rows += len(token_ids)
        self._experts_run += out.experts_run
        self._rows_routed += out.rows_routed
        return out

    def _take_token(self, token: int) -> Delta:
        """See what the next token means for the text."""
        sampling = self._sampling
        if not self._token_ids:
            self._first_token = time.perf_counter()
        self._token_ids.append(token)
        self._input = [token]
        ended = token in self._tokenizer.eos_ids and not sampling.ignore_eos
        if not ended:
            self._text += self._stream.step(token)
        stopped_at = self._find_stop() if sampling.stop else None
        if ended or stopped_at is not None:
            return self._finish("stop", token, stopped_at)
        if len(self._token_ids) == sampling.max_tokens:
            return self._finish("length", token, None)
        held_back = self._held_back() if sampling.stop else 0
        return Delta(self._take(len(self._text) - held_back), (token,))

    def _find_stop(self) -> int | None:
        """Where the earliest stop text begins, or None."""
        longest = max(map(len, self._sampling.stop), default=0)
        search_from = max(0, self._sent - longest)
        found = [self._text.find(stop, search_from) for stop in self._sampling.stop]
        return min((at for at in found if at >= 0), default=None)

    def _held_back(self) -> int:
        """Characters at the end of the text that may turn out to begin a stop text."""
        return max(
            (
                length
                for stop in self._sampling.stop
                for length in range(1, len(stop))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )

    def _take(self, end: int) -> str:
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _finish(self, reason: FinishReason, token: int, stopped_at: int | None) -> Delta:
        now = time.perf_counter()
        if stopped_at is not None:
            self._text = self._text[:stopped_at]
        elif reason == "length":  # bytes of an unfinished character become U+FFFD, as in decode
            self._text = self._tokenizer.decode(self._token_ids)
        written = len(self._token_ids)
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=written,
            ttft_seconds=self._first_token - self._started,
            tpot_seconds=(now - self._first_token) / (written - 1) if written > 1 else 0.0,
        )
        mean_experts = self._experts_run / self._rows_routed if self._rows_routed else 0.0
        mean_context = (self._rows + 1) // 2
        completion = Completion(
            text=self._text,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if self._sampling.logprobs is not None else None,
            finish_reason=reason,
            usage=usage,
            routing=AppliedRouting(
                name=self._subnet.name,
                fingerprint=self._subnet.fingerprint,
                depth=self._subnet.depth,
                active_params=self._subnet.active_params,
                mean_experts=mean_experts,
                flops_per_token=self._subnet.flops_per_token(mean_context, mean_experts),
            ),
        )
        return Delta(self._take(len(self._text)), (token,), reason, completion)
