"""Tool calls in answers: messages and stream deltas, from the generated text."""

from __future__ import annotations

import secrets
from typing import Any

from elastic_moe.engine.outputs import Choice, Delta
from elastic_moe.server.tools.choice import ToolOptions
from elastic_moe.server.tools.markers import MISTRAL
from elastic_moe.server.tools.parser import CallPiece, ToolCallParser


class ToolCallWriter:
    """Writes the messages and deltas of one answer, with the calls found in its text."""

    def __init__(self, options: ToolOptions) -> None:
        self._options = options
        self._parsers: dict[int, ToolCallParser] = {}  # by choice

    def message(self, choice: Choice) -> tuple[dict[str, Any], str]:
        """The message of a choice, and its finish_reason."""
        parser = self._parsers[choice.index] = self._options.parser()
        parsed, rest = parser.feed(choice.text), parser.finish()
        only_calls = parser.count or self._options.mode != "auto"
        calls: list[dict[str, Any]] = []
        for piece in parsed.calls:
            if piece.name is not None:
                calls.append(self._call(piece.name))
            calls[-1]["function"]["arguments"] += piece.arguments
        content = parsed.content + rest.content
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if only_calls and not content else content,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        return message, self.finish_reason(choice.index, choice.finish_reason)

    def deltas(self, delta: Delta) -> list[dict[str, Any]]:
        """The `delta` objects for a piece of text; none while it may be part of a marker."""
        parser, first = self._parsers.get(delta.choice), False
        if parser is None:
            parser, first = self._options.parser(), True
            self._parsers[delta.choice] = parser
        content, calls = parser.feed(delta.text)
        if delta.finish_reason is not None:
            content += parser.finish().content
        deltas: list[dict[str, Any]] = [{"content": content}] if content else []
        deltas += [{"tool_calls": [self._call_delta(call)]} for call in calls]
        if first:
            deltas[:1] = [{"role": "assistant", "content": None, **(deltas[0] if deltas else {})}]
        return deltas or ([{}] if delta.logprobs else [])

    def finish_reason(self, choice: int, reason: str) -> str:
        """The finish_reason of a choice whose text is complete; "tool_calls" in place of "stop"."""
        parser = self._parsers[choice]
        called = parser.count and not parser.open and self._options.mode != "named"
        return "tool_calls" if called and reason == "stop" else reason

    def _call(self, name: str) -> dict[str, Any]:
        """A new call, without arguments yet."""
        return {
            "id": self._new_id(),
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }

    def _call_delta(self, piece: CallPiece) -> dict[str, Any]:
        if piece.name is not None:
            return {"index": piece.call_index, **self._call(piece.name)}
        return {"index": piece.call_index, "function": {"arguments": piece.arguments}}

    def _new_id(self) -> str:
        if self._options.markers is MISTRAL:  # its templates accept 9 characters only
            return secrets.token_hex(5)[:9]
        return f"call_{secrets.token_hex(12)}"
