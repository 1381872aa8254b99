"""Which functions a request lets the model call, and whether it must: `tools`, `tool_choice`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from elastic_moe.engine import SamplingParams
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.protocol.chat import ChatRequest
from elastic_moe.protocol.tools import AllowedToolChoice, Function, NamedTool
from elastic_moe.routing import shorten
from elastic_moe.server.errors import ApiError
from elastic_moe.server.tools.markers import Markers, find_markers, marker_token_ids
from elastic_moe.server.tools.parser import ToolCallParser
from elastic_moe.server.tools.schema import arguments_schema, calls_schema

Mode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class ToolOptions:
    """The tools of one request.

    Attributes:
        shown: functions in the prompt.
        functions: functions that the model may call.
        mode: 'none'; 'auto': the model may call some; 'required': it must; 'named': it must call
            the only one.
        parallel: an answer may have more than one call.
        markers: around calls that the model makes by itself.
        marker_ids: special tokens that stay in the text, as they are markers.
    """

    shown: tuple[Function, ...]
    functions: tuple[Function, ...]
    mode: Mode
    parallel: bool
    markers: Markers | None
    marker_ids: tuple[int, ...]

    @classmethod
    def from_request(cls, body: ChatRequest, tokenizer: Tokenizer) -> ToolOptions | None:
        """The tools of a request; None if it has none.

        Raises:
            ApiError: the request contradicts itself.
        """
        if body.tools is None:
            for knob in ("tool_choice", "parallel_tool_calls"):
                if getattr(body, knob) is not None:
                    raise ApiError(400, f"{knob} needs tools.", param=knob)
            return None
        functions = tuple(tool.function for tool in body.tools)
        _check_functions(functions)
        mode, names = _tool_choice(body)
        for name in names:
            if all(name != function.name for function in functions):
                raise ApiError(
                    400,
                    f"tool_choice names {name}, which is none of tools.",
                    param="tool_choice",
                )
        text_format = body.response_format
        demanded = mode in ("required", "named")
        if demanded and text_format is not None and text_format.type != "text":
            raise ApiError(
                400,
                f"response_format {text_format.type} and a tool_choice that demands a call say "
                f"different things: the answer is either. Leave one of them out.",
                param="response_format",
            )
        markers = find_markers(tokenizer)
        allowed = tuple(f for f in functions if not names or f.name in names)
        return cls(
            shown=functions if mode == "named" else allowed,
            functions=allowed,
            mode=mode,
            parallel=body.parallel_tool_calls is not False,
            markers=markers,
            marker_ids=() if mode == "none" else marker_token_ids(tokenizer, markers),
        )

    def for_template(self) -> list[dict[str, Any]]:
        """`tools` in the form that chat templates expect."""
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

    def constrain(self, params: SamplingParams) -> SamplingParams:
        """Parameters that force calls where the request demands them.

        Raises:
            ApiError: a schema is nested too deeply.
        """
        try:
            schema = self._schema()
        except RecursionError as error:
            raise ApiError(
                400, "a schema in tools is nested too deeply to be read.", param="tools"
            ) from error
        params = replace(params, shown_token_ids=self.marker_ids)
        return params if schema is None else replace(params, json_schema=schema)

    def _schema(self) -> dict[str, Any] | None:
        if self.mode == "named":
            return arguments_schema(self.functions[0])
        if self.mode == "required":
            return calls_schema(self.functions, parallel=self.parallel)
        return None

    def parser(self) -> ToolCallParser:
        """A parser for the text of one choice."""
        single = not self.parallel
        if self.mode == "named":
            name = self.functions[0].name
            return ToolCallParser(self.markers, "arguments", name=name, single=single)
        return ToolCallParser(
            self.markers, "calls" if self.mode == "required" else "text", single=single
        )


def _check_functions(functions: Sequence[Function]) -> None:
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


def _tool_choice(body: ChatRequest) -> tuple[Mode, list[str]]:
    """The mode, and the names of the allowed functions; none for all."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return "named", [choice.function.name]
    if isinstance(choice, AllowedToolChoice):
        allowed = choice.allowed_tools
        return allowed.mode, [tool.function.name for tool in allowed.tools]
    return choice or "auto", []
