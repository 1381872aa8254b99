"""What a request says of tools, for the model that answers it; and its calls as they are told."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Choice, Delta
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.protocol.chat import ChatRequest
from elastic_moe.protocol.tools import AllowedToolChoice, Function, NamedTool
from elastic_moe.routing import shorten
from elastic_moe.server.errors import ApiError
from elastic_moe.server.tools.schema import arguments_schema, calls_schema
from elastic_moe.server.tools.stream import CallPiece, Marks, ToolReader

HERMES = Marks("<tool_call>", "</tool_call>")  # also Qwen, ERNIE and the bundled model
MISTRAL = Marks("[TOOL_CALLS]", "")
Demand = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How a request's answer may use tools.

    Attributes:
        shown: the functions that the model gets to see.
        functions: those that it may call.
        demand: 'auto' where the model may call some, 'required' where it must, 'named' where it
            must call the only one.
        several: whether an answer may have more than one call.
        marks: of calls that the model makes by itself, as its chat template tells.
        shown_ids: tokens of the marks that texts leave out as a rule.
    """

    shown: tuple[Function, ...]
    functions: tuple[Function, ...]
    demand: Demand
    several: bool
    marks: Marks | None
    shown_ids: tuple[int, ...]

    @classmethod
    def of(cls, body: ChatRequest, tokenizer: Tokenizer) -> ToolUse | None:
        """What a request says; None if it has no tools.

        Raises:
            ApiError: it contradicts itself.
        """
        if body.tools is None:
            for knob in ("tool_choice", "parallel_tool_calls"):
                if getattr(body, knob) is not None:
                    raise ApiError(400, f"{knob} needs tools.", param=knob)
            return None
        everything = tuple(tool.function for tool in body.tools)
        _check(everything)
        demand, names = _demand(body)
        for name in names:
            if all(name != function.name for function in everything):
                raise ApiError(
                    400,
                    f"tool_choice names {name}, which is none of tools.",
                    param="tool_choice",
                )
        wanted = body.response_format
        if demand in ("required", "named") and wanted is not None and wanted.type != "text":
            raise ApiError(
                400,
                f"response_format {wanted.type} and a tool_choice that demands a call say "
                f"different things: the answer is either. Leave one of them out.",
                param="response_format",
            )
        marks = find_marks(tokenizer)
        chosen = tuple(own for own in everything if not names or own.name in names)
        return cls(
            shown=everything if demand == "named" else chosen,
            functions=chosen,
            demand=demand,
            several=body.parallel_tool_calls is not False,
            marks=marks,
            shown_ids=() if demand == "none" else _special(tokenizer, marks),
        )

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates know them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    "description": function.description or "",
                    "parameters": function.parameters or {"type": "object", "properties": {}},
                },
            }
            for function in self.shown
        ]

    def sampling(self, params: SamplingParams) -> SamplingParams:
        """Parameters under which the text is calls where calls are demanded.

        Raises:
            ApiError: a schema cannot be read.
        """
        try:
            schema = self._schema()
        except RecursionError as error:
            raise ApiError(
                400, "a schema in tools is nested too deeply to be read.", param="tools"
            ) from error
        shown = replace(params, shown_token_ids=self.shown_ids)
        return shown if schema is None else replace(shown, json_schema=schema)

    def _schema(self) -> dict[str, Any] | None:
        if self.demand == "named":
            return arguments_schema(self.functions[0])
        if self.demand == "required":
            return calls_schema(self.functions, several=self.several)
        return None

    def reader(self) -> ToolReader:
        """Reads a choice."""
        single = not self.several
        if self.demand == "named":
            name = self.functions[0].name
            return ToolReader(self.marks, "arguments", name=name, single=single)
        return ToolReader(
            self.marks, "calls" if self.demand == "required" else "text", single=single
        )

    def new_id(self) -> str:
        """An id for a call."""
        if self.marks is MISTRAL:  # whose templates refuse others
            return secrets.token_hex(5)[:9]
        return f"call_{secrets.token_hex(12)}"


class ToolWriter:
    """Writes the answer of one request, with the calls that its texts make."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._readers: dict[int, ToolReader] = {}  # by choice

    def whole(self, choice: Choice) -> tuple[dict[str, Any], str]:
        """The message of a choice, and its finish_reason."""
        reader = self._readers[choice.index] = self._use.reader()
        found, rest = reader.write(choice.text), reader.finish()
        only_calls = reader.count or self._use.demand != "auto"
        calls: list[dict[str, Any]] = []
        for piece in found.calls:
            if piece.name is not None:
                calls.append(self._begin(piece))
            calls[-1]["function"]["arguments"] += piece.arguments
        content = found.content + rest.content
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if only_calls and not content else content,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        return message, self.reason(choice.index, choice.finish_reason)

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """The `delta` of every chunk that a piece of text makes; none if it must wait."""
        reader, first = self._readers.get(delta.choice), False
        if reader is None:
            reader, first = self._use.reader(), True
            self._readers[delta.choice] = reader
        content, calls = reader.write(delta.text)
        if delta.finish_reason is not None:
            content += reader.finish().content
        pieces: list[dict[str, Any]] = [{"content": content}] if content else []
        pieces += [{"tool_calls": [self._piece(call)]} for call in calls]
        if first:
            pieces[:1] = [{"role": "assistant", "content": None, **(pieces[0] if pieces else {})}]
        return pieces or ([{}] if delta.logprobs else [])

    def reason(self, choice: int, reason: str) -> str:
        """The finish_reason of a choice, all of which has been written."""
        reader = self._readers[choice]
        called = reader.count and not reader.open and self._use.demand != "named"
        return "tool_calls" if called and reason == "stop" else reason

    def _begin(self, piece: CallPiece) -> dict[str, Any]:
        return {
            "id": self._use.new_id(),
            "type": "function",
            "function": {"name": piece.name, "arguments": ""},
        }

    def _piece(self, piece: CallPiece) -> dict[str, Any]:
        if piece.name is not None:
            return {"index": piece.number, **self._begin(piece)}
        return {"index": piece.number, "function": {"arguments": piece.arguments}}


def find_marks(tokenizer: Tokenizer) -> Marks | None:
    """The marks that a model sets, as its chat template shows; None if it has none."""
    source = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    return next((marks for marks in (MISTRAL, HERMES) if marks.begin in source), None)


def read_arguments(text: str, where: str) -> dict[str, Any]:
    """Arguments of a call in a conversation, as chat templates know them; none if it is empty.

    Raises:
        ApiError: they are no JSON object.
    """
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(
            400,
            f"{where}: arguments must be a JSON object as text, got {shorten(text)}.",
            param=where,
        )
    return arguments


def _special(tokenizer: Tokenizer, marks: Marks | None) -> tuple[int, ...]:
    """Special tokens that are marks."""
    texts = () if marks is None else (marks.begin, marks.end)
    found = (tokenizer.fast.token_to_id(text) for text in texts if text)
    return tuple(token for token in found if token in tokenizer.special_ids)


def _check(functions: Sequence[Function]) -> None:
    counts = Counter(function.name for function in functions)
    for function in functions:
        if counts[function.name] > 1:
            raise ApiError(400, f"tools has {function.name} more than once.", param="tools")
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            raise ApiError(
                400,
                f"tools: the parameters of {function.name} must be a schema of type 'object', "
                f"got {shorten(kind)}.",
                param="tools",
            )


def _demand(body: ChatRequest) -> tuple[Demand, list[str]]:
    """What tool_choice says, and the functions that it names."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return "named", [choice.function.name]
    if isinstance(choice, AllowedToolChoice):
        allowed = choice.allowed_tools
        return allowed.mode, [tool.function.name for tool in allowed.tools]
    return choice or "auto", []
