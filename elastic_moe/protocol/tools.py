"""Tools on the wire: the functions that a model may call, and its calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic_moe.protocol.base import Answer, Body, Count

FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]


class Function(Body):
    """A function that a model may call.

    Attributes:
        parameters: JSON schema of its arguments, an object; absent, it has none.
        strict: has no effect: a call that tool_choice demands obeys the schema in any case, and
            one that the model makes by itself is as the model wrote it.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionChoice(Body):
    """A function by its name."""

    name: FunctionName


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionChoice


class AllowedTools(Body):
    """The tools that the model sees, and whether it must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolChoice(Body):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice


class CalledFunction(Body):
    """A function that a model calls, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that an assistant's message holds."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionDelta(Answer):
    """The name, and a piece of the arguments; the first piece is empty."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    """A piece of a call. Only the first one has the id, the type and the name.

    Attributes:
        index: which call of the answer.
    """

    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
