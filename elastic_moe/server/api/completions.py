"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Choice, Completion, Delta, TokenLogprob
from elastic_moe.protocol.completions import CompletionRequest, TextCompletion
from elastic_moe.server.api.generation import EventWriter, GenerationHandler, describe_answer
from elastic_moe.server.api.logprobs import EchoedPrompt, TextOffset
from elastic_moe.server.api.sampling import sampling_params
from elastic_moe.server.errors import ApiError
from elastic_moe.server.service import Service
from elastic_moe.server.sse import TextEvent, event

DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API
MAX_PROMPTS = 1024


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoint of this module to the application."""

    @app.post("/v1/completions", **describe_answer(TextCompletion, TextCompletion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        return await CompletionHandler(service, body, request).respond()


class CompletionHandler(GenerationHandler[CompletionRequest]):
    """Answers one completion request, as a whole or as a stream."""

    id_prefix = "cmpl"
    object_name = chunk_object_name = "text_completion"

    def encode(self) -> list[list[int]]:
        """Token ids of every prompt."""
        prompts, encode = self.body.prompts(), self.service.engine.encode
        if len(prompts) > MAX_PROMPTS:
            raise ApiError(
                400,
                f"prompt must be at most {MAX_PROMPTS} prompts, got {len(prompts)}.",
                param="prompt",
            )
        return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def sampling_params(self) -> SamplingParams:
        """How to sample; log-probabilities of the prompt come with its echo."""
        body = self.body
        return sampling_params(
            body,
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            default_seed=self.service.settings.seed,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

    def choices(self, completions: list[Completion]) -> list[dict[str, Any]]:
        """`choices` of a whole answer, by prompt."""
        return [
            self._choice(index, self.prompts[index], completion, choice)
            for index, completion in enumerate(completions)
            for choice in completion.choices
        ]

    def _choice(
        self, index: int, prompt: list[int], completion: Completion, choice: Choice
    ) -> dict[str, Any]:
        """A choice of the prompt with this index."""
        logprobs = None
        if choice.logprobs is not None:
            echoed = _echoed_prompt(prompt, completion.prompt_logprobs)
            logprobs = self.service.logprobs.completion(choice.logprobs, TextOffset(), echoed)
        return {
            "index": index * self.body.n + choice.index,
            "text": self._echo(prompt) + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _echo(self, prompt: list[int]) -> str:
        return self.service.engine.decode(prompt) if self.body.echo else ""

    def event_writer(self, envelope: Mapping[str, Any]) -> EventWriter:
        """Writes the events of one stream."""
        n = self.body.n
        text_events: dict[int, TextEvent] = {}  # by choice, once it has started
        offsets: dict[int, TextOffset] = {}  # by choice
        echoed: dict[int, EchoedPrompt | None] = {}  # by prompt

        def chunk(
            index: int,
            text: str,
            logprobs: dict[str, Any] | None = None,
            finish_reason: str | None = None,
        ) -> dict[str, Any]:
            choice = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": finish_reason,
            }
            return {**envelope, "choices": [choice]}

        def write(delta: Delta) -> Iterator[bytes]:
            number, text, logprobs = delta.prompt, delta.text, None
            index = number * n + delta.choice
            text_event = text_events.get(index)
            if text_event is not None and delta.logprobs is None and delta.finish_reason is None:
                if text:
                    yield text_event(text)
                return
            prompt_logprobs = None
            if text_event is None:
                text = self._echo(self.prompts[number]) + text
                text_events[index] = TextEvent(chunk(index, TextEvent.PLACEHOLDER))
                offsets[index] = TextOffset()
                if number not in echoed:
                    echoed[number] = _echoed_prompt(self.prompts[number], delta.prompt_logprobs)
                prompt_logprobs = echoed[number]
            if delta.logprobs is not None:
                logprobs = self.service.logprobs.completion(
                    delta.logprobs, offsets[index], prompt_logprobs
                )
            body = chunk(index, text, logprobs, delta.finish_reason)
            if delta.completion is not None:
                body["routing"] = self.applied(delta.completion)
            yield event(body)

        return write


def _echoed_prompt(
    prompt: list[int], logprobs: tuple[TokenLogprob, ...] | None
) -> EchoedPrompt | None:
    return None if logprobs is None else (prompt[0], logprobs)
