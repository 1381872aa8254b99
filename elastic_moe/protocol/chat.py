"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic_moe.protocol.base import Answer, Body, Count, Usage
from elastic_moe.protocol.routing import AppliedRouting
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.protocol.tools import Tool, ToolCall, ToolCallDelta, ToolChoice

FinishReason = Literal["stop", "length", "tool_calls"]


class TextPart(Body):
    """A part of a message; there is no other kind, as the models read text."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatRequest(SamplingRequest):
    """A conversation to answer.

    Attributes:
        max_completion_tokens, max_tokens: two names of one limit; absent: the rest of the context.
        chat_template_kwargs: more variables for the chat template.
        tools: functions that the model may call.
        tool_choice: 'none', 'auto' (the default: the model decides), 'required' (1 to 16 calls and
            nothing else), or the function to call.
        parallel_tool_calls: whether an answer may have several calls.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class TopLogprob(Answer):
    """A likely token at this position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was sampled."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Of the tokens of a choice, or of a chunk of it."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Answer):
    """The answer.

    Attributes:
        content: null if there are only calls.
        tool_calls: functions for the client to call; absent if there are none.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    """One of the answers."""

    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    routing: AppliedRouting


class ChatDelta(Answer):
    """A piece of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    """A piece of one of the answers."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Answer):
    """An event of a stream; `data: [DONE]` is the last one.

    Attributes:
        usage: in the last chunk, which has no choices, if it was asked for.
        routing: in the chunks that have a finish_reason.
    """

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None
    routing: AppliedRouting | None = None
