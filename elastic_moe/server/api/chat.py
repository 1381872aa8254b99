"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Choice, Delta
from elastic_moe.errors import ContextLengthError
from elastic_moe.protocol.chat import ChatRequest, Message
from elastic_moe.server.api.generation import Answering, answer_json
from elastic_moe.server.api.sampling import sampling_params
from elastic_moe.server.errors import ApiError
from elastic_moe.server.routing.request import RoutingRequest
from elastic_moe.server.service import Service, usage
from elastic_moe.server.sse import EventStream, TextEvent, event
from elastic_moe.server.tools.choice import ToolUse, ToolWriter, read_arguments

RESERVED = {"messages", "add_generation_prompt", "tools"}


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates know them.

    Raises:
        ApiError: the arguments of a call are no JSON object.
    """
    plain = []
    for number, message in enumerate(messages):
        told = message.model_dump(exclude_none=True)
        if not isinstance(message.content, str):
            told["content"] = "".join(part.text for part in message.content or ())
        for call in told.get("tool_calls", ()):
            where = f"messages.{number}.tool_calls"
            call["function"]["arguments"] = read_arguments(call["function"]["arguments"], where)
        if message.role == "developer":  # the newer name
            told["role"] = "system"
        plain.append(told)
    return plain


class Chat(Answering):
    """Answers one chat request."""

    prefix = "chatcmpl"

    def __init__(self, service: Service, body: ChatRequest, routing: RoutingRequest) -> None:
        super().__init__(service, body, routing)
        self._body = body
        self._tools: ToolUse | None = None

    async def answer(self, receive: Any) -> Response:
        """The whole, or a stream of it.

        Raises:
            ApiError, ElasticMoEError: it cannot be served.
        """
        ids = await asyncio.to_thread(self._encode)
        params = self._params(len(ids))
        self.resolve_routing(len(ids) + params.max_tokens)
        if self._body.stream:
            return EventStream(self._events(ids, params), self.headers)
        (done,) = await self.generate([ids], params, receive)
        writer = self._writer()
        body = {
            **self.head("chat.completion"),
            "choices": [self._choice(choice, writer) for choice in done.choices],
            "usage": usage(done.usage),
            "routing": self.service.applied(self.routing, done.routing),
        }
        return answer_json(body, self.headers)

    def _encode(self) -> list[int]:
        variables = self._body.chat_template_kwargs or {}
        for name in sorted(RESERVED & variables.keys()):
            raise ApiError(
                400,
                f"chat_template_kwargs must not name {name}, which the request says itself.",
                param="chat_template_kwargs",
            )
        tokenizer = self.service.engine.tokenizer
        self._tools = ToolUse.of(self._body, tokenizer)
        if self._tools is not None:
            variables = {**variables, "tools": self._tools.for_template()}
        return tokenizer.encode_chat(template_messages(self._body.messages), **variables)

    def _params(self, prompt_tokens: int) -> SamplingParams:
        body, limit = self._body, self.service.engine.config.max_positions
        named = {n for n in (body.max_tokens, body.max_completion_tokens) if n is not None}
        if len(named) > 1:
            raise ApiError(
                400,
                f"max_tokens and max_completion_tokens name one limit, got {body.max_tokens} and "
                f"{body.max_completion_tokens}.",
                param="max_completion_tokens",
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if prompt_tokens >= limit:
            raise ContextLengthError(prompt_tokens, min(named, default=1), limit)
        params = sampling_params(
            body,
            max_tokens=named.pop() if named else limit - prompt_tokens,
            default_seed=self.service.settings.seed,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return params if self._tools is None else self._tools.sampling(params)

    def _writer(self) -> ToolWriter | None:
        """Writes the answer; None if it can have no calls."""
        use = self._tools
        return None if use is None or use.demand == "none" else ToolWriter(use)

    def _choice(self, choice: Choice, writer: ToolWriter | None) -> dict[str, Any]:
        told = choice.logprobs
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        reason: str = choice.finish_reason
        if writer is not None:
            message, reason = writer.whole(choice)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None if told is None else self.service.logprobs.chat(told),
            "finish_reason": reason,
        }

    async def _events(self, ids: list[int], params: SamplingParams) -> AsyncGenerator[bytes]:
        head, writer = self.head("chat.completion.chunk"), self._writer()
        events: dict[int, TextEvent] = {}  # of the choices that have begun

        def chunk(delta: Delta, piece: dict[str, Any], ended: bool = False) -> dict[str, Any]:
            told = None if ended else delta.logprobs
            reason: str | None = delta.finish_reason if ended else None
            if writer is not None and reason is not None:
                reason = writer.reason(delta.choice, reason)
            choice = {
                "index": delta.choice,
                "delta": piece,
                "logprobs": None if told is None else self.service.logprobs.chat(told),
                "finish_reason": reason,
            }
            return {**head, "choices": [choice]}

        async for delta in self.stream([ids], params):
            plain = events.get(delta.choice)
            if writer is not None:
                for piece in writer.pieces(delta):
                    yield event(chunk(delta, piece))
                    delta = delta._replace(logprobs=None)  # told once
            elif plain is None:
                yield event(chunk(delta, {"role": "assistant", "content": delta.text}))
                piece = {"content": TextEvent.PLACE}
                events[delta.choice] = TextEvent(chunk(delta._replace(logprobs=None), piece))
            elif delta.logprobs is not None:
                yield event(chunk(delta, {"content": delta.text}))
            elif delta.text:
                yield plain(delta.text)
            if delta.finish_reason is not None:
                if delta.completion is None:  # others go on: what this one cost is told at the end
                    yield event(chunk(delta, {}, ended=True))
                    continue
                done = delta.completion
                self.account.completions.append(done)
                applied = self.service.applied(self.routing, done.routing)
                yield event({**chunk(delta, {}, ended=True), "routing": applied})
                if self.include_usage:
                    yield event({**head, "choices": [], "usage": usage(done.usage)})
