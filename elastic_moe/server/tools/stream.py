"""Calls of tools in a text that comes piece by piece.

However a text is cut into pieces, the same content and the same calls come out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

# As nearly every call begins; another one is read when it is whole.
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*"([^"\\\x00-\x1f]+)"\s*,\s*"arguments"\s*:\s*(?=\{)', re.ASCII
)
_OBJECT = re.compile(r'\{\s*(?:["}]|$)', re.ASCII)  # as every one begins


@dataclass(frozen=True, slots=True)
class Marks:
    """How a model marks calls in its text.

    Attributes:
        begin: comes before a call, or a list of calls, in JSON: {"name": ..., "arguments": {...}}.
        end: comes behind it; may be empty.
    """

    begin: str
    end: str


class CallPiece(NamedTuple):
    """What a piece of text gave a call.

    Attributes:
        number: which call, from 0.
        name: of the function, in the first piece alone.
        arguments: a piece of their JSON.
    """

    number: int
    name: str | None
    arguments: str


class Found(NamedTuple):
    """What a piece of text turned out to be."""

    content: str
    calls: list[CallPiece]


class ToolReader:
    """Tells calls and content apart.

    White space around calls is layout, but for what parts content behind one from content before.
    What began like a call and is none is content, as it was written.

    Args:
        marks: that the model sets; None if it has none.
        start: what the text begins with: 'text', or without a mark 'calls', or the 'arguments' of
            one.
        name: of the function that these arguments are for.
        single: leave out all calls but the first.

    Attributes:
        count: calls that have begun.
        open: whether the arguments of one are not whole yet.
    """

    def __init__(
        self,
        marks: Marks | None,
        start: Literal["text", "calls", "arguments"] = "text",
        *,
        name: str = "",
        single: bool = False,
    ) -> None:
        self.count, self.open = 0, False
        self._begin_mark, self._end_mark = (marks.begin, marks.end) if marks else ("", "")
        self._start, self._name, self._single = start, name, single
        first = {"text": self._text, "calls": self._begin, "arguments": self._bare}
        self._state: Callable[[], bool] = first[start]
        self._rest = ""  # not read yet
        # Read, and content if no call comes of it; None once one has come.
        self._undecided: str | None = ""
        self._object = ""  # a call, as far as it came
        self._brackets = _Brackets()
        self._in_list = self._left_out = False
        self._told = False  # whether there is content
        self._behind_call = False  # and only white space since then
        self._content = ""
        self._calls: list[CallPiece] = []

    def write(self, text: str) -> Found:
        """What is found when so much more of the text has come."""
        self._rest += text
        while self._state():
            pass
        found = Found(self._content, self._calls)
        self._content, self._calls = "", []
        return found

    def finish(self) -> Found:
        """What is left when all of the text has come.

        The beginning of a call whose name is not known yet is content only if it need not have
        become a call.
        """
        rest = ""
        if self._state == self._text:
            rest = "" if self._behind_call and self._rest.isspace() else self._rest
        elif self._start == "text" and self._undecided is not None:
            rest = self._undecided + self._object + self._rest
        return Found(rest, [])

    # States. Each reads what it can, and says whether the next one can go on.

    def _text(self) -> bool:
        """Content, up to a mark."""
        if self._behind_call and not self._told:
            self._rest = self._rest.lstrip()
        if not self._begin_mark:
            self._tell(self._rest)
            self._rest = ""
            return False
        at = self._rest.find(self._begin_mark)
        end = at if at >= 0 else len(self._rest) - _begun(self._rest, self._begin_mark)
        text = self._rest[:end].rstrip()
        self._tell(text)
        self._rest = self._rest[len(text) :]
        if at < 0:
            return False
        self._undecided = ""
        self._pass(at - len(text) + len(self._begin_mark))
        self._state = self._begin
        return True

    def _begin(self) -> bool:
        """A call, or what stands between the calls of a list."""
        self._pass_blanks()
        if not self._rest:
            return False
        first = self._rest[0]
        if first == "{":
            self._brackets, self._state = _Brackets(), self._head
        elif first == ("," if self._in_list else "["):
            self._pass(1)
            self._in_list = True
        elif first == "]" and self._undecided is None:
            self._pass(1)
            self._in_list, self._state = False, self._end
        else:
            self._give_up()
        return True

    def _head(self) -> bool:
        """A call up to its arguments, or the whole of it."""
        end = self._brackets.end(self._rest)
        taken = len(self._rest) if end is None else end
        self._object += self._rest[:taken]
        self._rest = self._rest[taken:]
        head = _HEAD.match(self._object)
        if head is not None:
            self._rest = self._object[head.end() :] + self._rest
            self._begin_call(head[1])
            self._state = self._arguments
            return True
        if end is None and _OBJECT.match(self._object):
            return False
        call = None if end is None else _whole_call(self._object)
        if call is None:
            self._give_up()
        else:
            self._begin_call(call[0])
            self._tell_arguments(call[1])
            self._end_call()
        return True

    def _bare(self) -> bool:
        """Arguments with nothing around them."""
        self._pass_blanks()
        if not self._rest:
            return False
        if self._rest[0] == "{":
            self._begin_call(self._name)
            self._state = self._arguments
        else:
            self._give_up()
        return True

    def _arguments(self) -> bool:
        end = self._brackets.end(self._rest)
        taken = len(self._rest) if end is None else end
        self._tell_arguments(self._rest[:taken])
        self._rest = self._rest[taken:]
        if end is None:
            return False
        self.open = False
        self._state = self._tail
        return True

    def _tail(self) -> bool:
        """What a call has behind its arguments."""
        self._rest = self._rest.lstrip()
        if not self._rest:
            return False
        if self._rest[0] == ",":
            self._brackets, self._state = _Brackets(depth=1), self._other_keys
            return True
        if self._rest[0] == "}":  # a model may forget it
            self._rest = self._rest[1:]
        self._end_call()
        return True

    def _other_keys(self) -> bool:
        end = self._brackets.end(self._rest)
        self._rest = "" if end is None else self._rest[end:]
        if end is not None:
            self._end_call()
        return end is not None

    def _end(self) -> bool:
        """The mark behind calls, which a model may forget, too."""
        stripped = self._rest.lstrip()
        if self._end_mark and stripped.startswith(self._end_mark):
            self._rest = stripped[len(self._end_mark) :]
        elif self._end_mark and self._end_mark.startswith(stripped):
            return False
        self._behind_call, self._state = True, self._text
        return True

    # What states do

    def _tell(self, content: str) -> None:
        if content:
            self._content += content
            self._told, self._behind_call = True, False

    def _pass(self, count: int) -> None:
        """Read so many characters, which are no content if a call comes of them."""
        if self._undecided is not None:
            self._undecided += self._rest[:count]
        self._rest = self._rest[count:]

    def _pass_blanks(self) -> None:
        self._pass(len(self._rest) - len(self._rest.lstrip()))

    def _give_up(self) -> None:
        """It is no call."""
        self._tell(self._undecided or "")
        self._rest, self._object = self._object + self._rest, ""
        self._in_list, self._state = False, self._text

    def _begin_call(self, name: str) -> None:
        self._undecided, self._object, self._brackets = None, "", _Brackets()
        self._left_out = self._single and self.count > 0
        if not self._left_out:
            self._calls.append(CallPiece(self.count, name, ""))
            self.count, self.open = self.count + 1, True

    def _tell_arguments(self, piece: str) -> None:
        if piece and not self._left_out:
            self._calls.append(CallPiece(self.count - 1, None, piece))

    def _end_call(self) -> None:
        self.open = False
        self._state = self._begin if self._in_list else self._end


class _Brackets:
    """Looks for the bracket that ends a JSON value."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def end(self, text: str) -> int | None:
        """Where the value ends in this next piece of it; None if it does not."""
        for at, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return None


def _begun(text: str, mark: str) -> int:
    """Characters at the end of a text that may turn out to begin a mark."""
    return max((size for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)


def _whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call, which may also have no arguments, or them as text."""
    try:
        call = json.loads(text)
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        told = json.dumps({} if arguments is None else arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    # What cannot be printed may be no valid Unicode.
    fine = isinstance(name, str) and name.isprintable() and bool(name) and told[0] == "{"
    return (name, told) if fine else None
