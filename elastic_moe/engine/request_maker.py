"""Turning a checked request into a job: samplers, constraints, end tokens, sequences."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.engine.generation.generation import Generation
from elastic_moe.engine.generation.json_grammar import JsonGrammars
from elastic_moe.engine.generation.sampler import Sampler
from elastic_moe.engine.job import Job, Sink
from elastic_moe.engine.running.runner import Runner
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.errors import RequestError
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.routing import Subnet, shorten


class RequestMaker:
    """Makes jobs for one model."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer) -> None:
        self._runner, self._tokenizer = runner, tokenizer
        self._vocab_size = runner.config.vocab_size
        self._grammars = JsonGrammars(tokenizer, self._vocab_size)

    def make(
        self, number: int, prompt: list[int], subnet: Subnet, params: SamplingParams, sink: Sink
    ) -> Job:
        """A job with all its choices.

        Raises:
            RequestError: a token id is unknown, or a schema cannot be followed.
            EngineError: what JSON needs is not there.
        """
        forced = self._forced(params)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", list(params.logit_bias or ()))
        tokenizer = self._tokenizer.showing(params.shown_token_ids)
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self._tokenizer.eos_ids
        job = Job(number, prompt, subnet, params, sink)
        for index, constraint in enumerate(self._grammars.constraints(params)):
            sampler = Sampler(
                params,
                prompt,
                index,
                ends,
                constraint=constraint,
                forced=forced,
            )
            generation = Generation(
                tokenizer,
                params,
                sampler,
                index,
                ends,
                None if forced is None else len(forced),
            )
            job.add_text(generation, self._runner.open_managed)
        return job

    def _forced(self, params: SamplingParams) -> list[int] | None:
        text = params.forced_text
        if text is None:
            return None
        if isinstance(text, str):
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if not ids:
                raise RequestError(f"forced_text {shorten(text)} has no tokens.")
            return ids
        self._check_ids("forced_text", text)
        return list(text)

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        for token in ids:
            if token >= self._vocab_size:
                raise RequestError(
                    f"{field} has token id {token}, ids must be in [0, {self._vocab_size})."
                )
