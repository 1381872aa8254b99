"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Choice, Completion, Delta
from elastic_moe.protocol.chat import ChatChunk, ChatCompletion, ChatRequest, Message
from elastic_moe.routing import shorten
from elastic_moe.server.api.generation import EventWriter, GenerationHandler, describe_answer
from elastic_moe.server.api.sampling import sampling_params
from elastic_moe.server.errors import ApiError
from elastic_moe.server.service import Service
from elastic_moe.server.sse import TextEvent, event
from elastic_moe.server.tools.choice import ToolOptions
from elastic_moe.server.tools.response import ToolCallWriter

RESERVED_VARIABLES = {"messages", "add_generation_prompt", "tools"}  # of chat templates


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoint of this module to the application."""

    @app.post("/v1/chat/completions", **describe_answer(ChatCompletion, ChatChunk))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await ChatHandler(service, body, request).respond()


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates expect.

    Raises:
        ApiError: the arguments of a tool call are not a JSON object.
    """
    plain = []
    for index, message in enumerate(messages):
        fields = message.model_dump(exclude_none=True)
        if not isinstance(message.content, str):
            fields["content"] = "".join(part.text for part in message.content or ())
        for call in fields.get("tool_calls", ()):
            param = f"messages.{index}.tool_calls"
            call["function"]["arguments"] = _parse_arguments(call["function"]["arguments"], param)
        if message.role == "developer":  # OpenAI's newer name
            fields["role"] = "system"
        plain.append(fields)
    return plain


def _parse_arguments(text: str, param: str) -> dict[str, Any]:
    """Arguments of a call as the object that chat templates expect; an empty text has none.

    Raises:
        ApiError: the text is not a JSON object.
    """
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(
            400,
            f"{param}: arguments must be a JSON object as text, got {shorten(text)}.",
            param=param,
        )
    return arguments


class ChatHandler(GenerationHandler[ChatRequest]):
    """Answers one chat request, as a whole or as a stream."""

    id_prefix = "chatcmpl"
    object_name, chunk_object_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatRequest, request: Request) -> None:
        super().__init__(service, body, request)
        self._check_template_variables()
        self._tools = ToolOptions.from_request(self.body, service.engine.tokenizer)

    def _check_template_variables(self) -> None:
        reserved = sorted(RESERVED_VARIABLES & (self.body.chat_template_kwargs or {}).keys())
        if reserved:
            raise ApiError(
                400,
                f"chat_template_kwargs must not name {reserved[0]}, which the request says itself.",
                param="chat_template_kwargs",
            )

    def encode(self) -> list[list[int]]:
        """Token ids of the conversation."""
        variables = self.body.chat_template_kwargs or {}
        if self._tools is not None:
            variables = {**variables, "tools": self._tools.for_template()}
        messages = template_messages(self.body.messages)
        return [self.service.engine.tokenizer.encode_chat(messages, **variables)]

    def sampling_params(self) -> SamplingParams:
        """How to sample; without a limit of its own, an answer fills the context."""
        body, (prompt,) = self.body, self.prompts
        left = self.service.engine.config.max_positions - len(prompt)
        given = {n for n in (body.max_tokens, body.max_completion_tokens) if n is not None}
        if len(given) > 1:
            raise ApiError(
                400,
                f"max_tokens and max_completion_tokens name one limit, got {body.max_tokens} and "
                f"{body.max_completion_tokens}.",
                param="max_completion_tokens",
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        params = sampling_params(
            body,
            max_tokens=given.pop() if given else max(1, left),
            default_seed=self.service.settings.seed,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return params if self._tools is None else self._tools.constrain(params)

    def _tool_writer(self) -> ToolCallWriter | None:
        """Finds calls in the generated text; None if the request allows none."""
        tools = self._tools
        return None if tools is None or tools.mode == "none" else ToolCallWriter(tools)

    def choices(self, completions: list[Completion]) -> list[dict[str, Any]]:
        """`choices` of a whole answer."""
        (completion,), writer = completions, self._tool_writer()
        return [self._choice(choice, writer) for choice in completion.choices]

    def _choice(self, choice: Choice, writer: ToolCallWriter | None) -> dict[str, Any]:
        logprobs = choice.logprobs
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        finish_reason: str = choice.finish_reason
        if writer is not None:
            message, finish_reason = writer.message(choice)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None if logprobs is None else self.service.logprobs.chat(logprobs),
            "finish_reason": finish_reason,
        }

    def event_writer(self, envelope: Mapping[str, Any]) -> EventWriter:
        """Writes the events of one stream."""
        writer = self._tool_writer()
        text_events: dict[int, TextEvent] = {}  # by choice, once it has started

        def chunk(delta: Delta, piece: dict[str, Any], last: bool = False) -> dict[str, Any]:
            logprobs = None if last else delta.logprobs
            finish_reason: str | None = delta.finish_reason if last else None
            if writer is not None and finish_reason is not None:
                finish_reason = writer.finish_reason(delta.choice, finish_reason)
            choice = {
                "index": delta.choice,
                "delta": piece,
                "logprobs": None if logprobs is None else self.service.logprobs.chat(logprobs),
                "finish_reason": finish_reason,
            }
            return {**envelope, "choices": [choice]}

        def write(delta: Delta) -> Iterator[bytes]:
            text_event = text_events.get(delta.choice)
            if writer is not None:
                for piece in writer.deltas(delta):
                    yield event(chunk(delta, piece))
                    delta = delta._replace(logprobs=None)  # in the first chunk alone
            elif text_event is None:
                yield event(chunk(delta, {"role": "assistant", "content": delta.text}))
                piece = {"content": TextEvent.PLACEHOLDER}
                text_events[delta.choice] = TextEvent(chunk(delta._replace(logprobs=None), piece))
            elif delta.logprobs is not None:
                yield event(chunk(delta, {"content": delta.text}))
            elif delta.text:
                yield text_event(delta.text)
            if delta.finish_reason is not None:
                last = chunk(delta, {}, last=True)
                if delta.completion is not None:  # of the choice that ends last
                    last["routing"] = self.applied(delta.completion)
                yield event(last)

        return write
