"""Finds tool calls in generated text, piece by piece.

The result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from elastic_moe.server.tools.markers import Markers

# The start of nearly every call; other forms are parsed once they are complete.
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*"([^"\\\x00-\x1f]+)"\s*,\s*"arguments"\s*:\s*(?=\{)', re.ASCII
)
_OBJECT = re.compile(r'\{\s*(?:["}]|$)', re.ASCII)  # the start of every call


class CallPiece(NamedTuple):
    """A piece of a tool call.

    Attributes:
        call_index: of the call in the answer.
        name: of the function, in the first piece only.
        arguments: a piece of their JSON.
    """

    call_index: int
    name: str | None
    arguments: str


class Parsed(NamedTuple):
    """Content and calls found in a piece of text."""

    content: str
    calls: list[CallPiece]


class ToolCallParser:
    """Separates tool calls from content.

    White space around calls is dropped, except between content before and after a call. Text that
    only starts like a call is content.

    Args:
        markers: around calls in the model's text; None if it has none.
        start: what the text starts with: 'text'; or, without a marker, 'calls', or the 'arguments'
            of a single call.
        name: of the function that these arguments are for.
        single: drop all calls but the first.

    Attributes:
        count: calls started so far.
        open: the arguments of a call are incomplete.
    """

    def __init__(
        self,
        markers: Markers | None,
        start: Literal["text", "calls", "arguments"] = "text",
        *,
        name: str = "",
        single: bool = False,
    ) -> None:
        self.count, self.open = 0, False
        self._start_marker, self._end_marker = ("", "")
        if markers is not None:
            self._start_marker, self._end_marker = markers.start, markers.end
        self._start, self._name, self._single = start, name, single
        states = {"text": self._text, "calls": self._calls_start, "arguments": self._bare_arguments}
        self._state: Callable[[], bool] = states[start]
        self._rest = ""  # unread text
        # Read text that is content unless a call follows; None once one did.
        self._undecided: str | None = ""
        self._object = ""  # the start of a call
        self._brackets = _BracketCounter()
        self._in_list = self._dropped = False
        self._has_content = False
        self._after_call = False  # only white space since the last call
        self._content = ""
        self._calls: list[CallPiece] = []

    def feed(self, text: str) -> Parsed:
        """What the next piece of text adds."""
        self._rest += text
        while self._state():
            pass
        found = Parsed(self._content, self._calls)
        self._content, self._calls = "", []
        return found

    def finish(self) -> Parsed:
        """What remains at the end of the text.

        An incomplete call without a name yet is content, unless the text had to be a call.
        """
        rest = ""
        if self._state == self._text:
            rest = "" if self._after_call and self._rest.isspace() else self._rest
        elif self._start == "text" and self._undecided is not None:
            rest = self._undecided + self._object + self._rest
        return Parsed(rest, [])

    # States: each reads what it can, and returns whether the next state can go on.

    def _text(self) -> bool:
        """Content, up to a marker."""
        if self._after_call and not self._has_content:
            self._rest = self._rest.lstrip()
        if not self._start_marker:
            self._add_content(self._rest)
            self._rest = ""
            return False
        at = self._rest.find(self._start_marker)
        end = at if at >= 0 else len(self._rest) - _marker_prefix(self._rest, self._start_marker)
        text = self._rest[:end].rstrip()
        self._add_content(text)
        self._rest = self._rest[len(text) :]
        if at < 0:
            return False
        self._undecided = ""
        self._skip(at - len(text) + len(self._start_marker))
        self._state = self._calls_start
        return True

    def _calls_start(self) -> bool:
        """A call, or a separator in a list of calls."""
        self._skip_blanks()
        if not self._rest:
            return False
        first = self._rest[0]
        if first == "{":
            self._brackets, self._state = _BracketCounter(), self._call_head
        elif first == ("," if self._in_list else "["):
            self._skip(1)
            self._in_list = True
        elif first == "]" and self._undecided is None:
            self._skip(1)
            self._in_list, self._state = False, self._calls_end
        else:
            self._not_a_call()
        return True

    def _call_head(self) -> bool:
        """A call up to its arguments, or as a whole."""
        end = self._brackets.end(self._rest)
        taken = len(self._rest) if end is None else end
        self._object += self._rest[:taken]
        self._rest = self._rest[taken:]
        head = _HEAD.match(self._object)
        if head is not None:
            self._rest = self._object[head.end() :] + self._rest
            self._start_call(head[1])
            self._state = self._arguments
            return True
        if end is None and _OBJECT.match(self._object):
            return False
        call = None if end is None else _parse_call(self._object)
        if call is None:
            self._not_a_call()
        else:
            self._start_call(call[0])
            self._add_arguments(call[1])
            self._end_call()
        return True

    def _bare_arguments(self) -> bool:
        """The start of arguments without a call around them."""
        self._skip_blanks()
        if not self._rest:
            return False
        if self._rest[0] == "{":
            self._start_call(self._name)
            self._state = self._arguments
        else:
            self._not_a_call()
        return True

    def _arguments(self) -> bool:
        end = self._brackets.end(self._rest)
        taken = len(self._rest) if end is None else end
        self._add_arguments(self._rest[:taken])
        self._rest = self._rest[taken:]
        if end is None:
            return False
        self.open = False
        self._state = self._call_tail
        return True

    def _call_tail(self) -> bool:
        """The rest of a call after its arguments."""
        self._rest = self._rest.lstrip()
        if not self._rest:
            return False
        if self._rest[0] == ",":
            self._brackets, self._state = _BracketCounter(depth=1), self._other_keys
            return True
        if self._rest[0] == "}":  # models may forget it
            self._rest = self._rest[1:]
        self._end_call()
        return True

    def _other_keys(self) -> bool:
        end = self._brackets.end(self._rest)
        self._rest = "" if end is None else self._rest[end:]
        if end is not None:
            self._end_call()
        return end is not None

    def _calls_end(self) -> bool:
        """The marker after calls, which models may forget, too."""
        stripped = self._rest.lstrip()
        if self._end_marker and stripped.startswith(self._end_marker):
            self._rest = stripped[len(self._end_marker) :]
        elif self._end_marker and self._end_marker.startswith(stripped):
            return False
        self._after_call, self._state = True, self._text
        return True

    # Actions of states

    def _add_content(self, content: str) -> None:
        if content:
            self._content += content
            self._has_content, self._after_call = True, False

    def _skip(self, count: int) -> None:
        """Read so many characters, which are content only if no call follows."""
        if self._undecided is not None:
            self._undecided += self._rest[:count]
        self._rest = self._rest[count:]

    def _skip_blanks(self) -> None:
        self._skip(len(self._rest) - len(self._rest.lstrip()))

    def _not_a_call(self) -> None:
        """Turn what was read since the marker into content."""
        self._add_content(self._undecided or "")
        self._rest, self._object = self._object + self._rest, ""
        self._in_list, self._state = False, self._text

    def _start_call(self, name: str) -> None:
        self._undecided, self._object, self._brackets = None, "", _BracketCounter()
        self._dropped = self._single and self.count > 0
        if not self._dropped:
            self._calls.append(CallPiece(self.count, name, ""))
            self.count, self.open = self.count + 1, True

    def _add_arguments(self, piece: str) -> None:
        if piece and not self._dropped:
            self._calls.append(CallPiece(self.count - 1, None, piece))

    def _end_call(self) -> None:
        self.open = False
        self._state = self._calls_start if self._in_list else self._calls_end


class _BracketCounter:
    """Finds the bracket that ends a JSON value."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def end(self, text: str) -> int | None:
        """End of the value in its next piece; None if it goes on."""
        for position, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return position + 1
        return None


def _marker_prefix(text: str, marker: str) -> int:
    """Number of characters at the end of a text that may be the start of a marker."""
    sizes = range(1, len(marker))
    return max((size for size in sizes if text.endswith(marker[:size])), default=0)


def _parse_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a complete call; the arguments may be missing, or be a JSON string."""
    try:
        call = json.loads(text)
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        arguments_text = json.dumps({} if arguments is None else arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    # Unprintable names may be invalid Unicode.
    valid = isinstance(name, str) and name.isprintable() and bool(name)
    return (name, arguments_text) if valid and arguments_text[0] == "{" else None
