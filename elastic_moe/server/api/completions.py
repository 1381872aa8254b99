"""/v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Choice, Completion, TokenLogprob
from elastic_moe.errors import ContextLengthError
from elastic_moe.protocol.completions import CompletionRequest
from elastic_moe.server.api.generation import Answering, answer_json
from elastic_moe.server.api.logprobs import Echoed, Place
from elastic_moe.server.api.sampling import sampling_params
from elastic_moe.server.errors import ApiError
from elastic_moe.server.routing.request import RoutingRequest
from elastic_moe.server.service import Service, usage
from elastic_moe.server.sse import EventStream, TextEvent, event

MAX_TOKENS = 16  # OpenAI's default
MAX_PROMPTS = 1024


class TextCompleting(Answering):
    """Answers one completion request."""

    prefix = "cmpl"

    def __init__(self, service: Service, body: CompletionRequest, routing: RoutingRequest) -> None:
        super().__init__(service, body, routing)
        self._body = body

    async def answer(self, receive: Any) -> Response:
        """The whole, or a stream of it.

        Raises:
            ApiError, ElasticMoEError: it cannot be served.
        """
        prompts = await asyncio.to_thread(self._prompts)
        params = self._params(prompts)
        self.resolve_routing(max(map(len, prompts)) + params.max_tokens)
        if self._body.stream:
            return EventStream(self._events(prompts, params), self.headers)
        done = await self.generate(prompts, params, receive)
        n, body = self._body.n, self.head("text_completion")
        body["choices"] = [
            self._choice(i * n, prompts[i], completion, choice)
            for i, completion in enumerate(done)
            for choice in completion.choices
        ]
        body["usage"] = usage(*(completion.usage for completion in done))
        body["routing"] = self.service.applied(self.routing, done[0].routing)
        return answer_json(body, self.headers)

    def _prompts(self) -> list[list[int]]:
        """Token ids of every prompt."""
        prompts, encode = self._body.prompts(), self.service.engine.encode
        if len(prompts) > MAX_PROMPTS:
            raise ApiError(
                400,
                f"prompt must be at most {MAX_PROMPTS} prompts, got {len(prompts)}.",
                param="prompt",
            )
        return [encode(own) if isinstance(own, str) else own for own in prompts]

    def _params(self, prompts: list[list[int]]) -> SamplingParams:
        body, limit = self._body, self.service.engine.config.max_positions
        max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
        for ids in prompts:
            if len(ids) + max_tokens > limit:
                raise ContextLengthError(len(ids), max_tokens, limit)
        return sampling_params(
            body,
            max_tokens=max_tokens,
            default_seed=self.service.settings.seed,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

    def _choice(
        self, first: int, prompt: list[int], done: Completion, choice: Choice
    ) -> dict[str, Any]:
        text = self._echo(prompt) + choice.text
        told = None
        if choice.logprobs is not None:
            echoed = self._echoed(prompt, done.prompt_logprobs)
            told = self.service.logprobs.completion(choice.logprobs, Place(), echoed)
        return {
            "index": first + choice.index,
            "text": text,
            "logprobs": told,
            "finish_reason": choice.finish_reason,
        }

    def _echo(self, prompt: list[int]) -> str:
        return self.service.engine.decode(prompt) if self._body.echo else ""

    def _echoed(self, prompt: list[int], told: tuple[TokenLogprob, ...] | None) -> Echoed | None:
        return None if told is None else (prompt[0], told)

    async def _events(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> AsyncGenerator[bytes]:
        head, n = self.head("text_completion"), self._body.n
        events: dict[int, TextEvent] = {}  # of the choices that have begun
        places: dict[int, Place] = {}
        echoes: dict[int, Echoed | None] = {}  # of the prompts that have begun
        done: list[Completion] = []

        def choice(
            index: int, text: str, told: dict[str, Any] | None = None, reason: str | None = None
        ) -> dict[str, Any]:
            return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

        async for delta in self.stream(prompts, params):
            number, text, told = delta.prompt, delta.text, None
            index = number * n + delta.choice
            plain = events.get(index)
            if plain is not None and delta.logprobs is None and delta.finish_reason is None:
                if text:
                    yield plain(text)
                continue
            echoed = None
            if plain is None:
                text = self._echo(prompts[number]) + text
                events[index] = TextEvent({**head, "choices": [choice(index, TextEvent.PLACE)]})
                places[index] = Place()
                if number not in echoes:
                    echoes[number] = self._echoed(prompts[number], delta.prompt_logprobs)
                echoed = echoes[number]
            if delta.logprobs is not None:
                write = self.service.logprobs.completion
                told = write(delta.logprobs, places[index], echoed)
            body = {**head, "choices": [choice(index, text, told, delta.finish_reason)]}
            if delta.completion is not None:
                done.append(delta.completion)
                self.account.completions.append(delta.completion)
                body["routing"] = self.service.applied(self.routing, delta.completion.routing)
            yield event(body)
        if self.include_usage:
            yield event({**head, "choices": [], "usage": usage(*(c.usage for c in done))})
