"""Calls in a text: the same ones come out of it however it is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.server.tools.markers import HERMES, MISTRAL
from elastic_moe.server.tools.parser import ToolCallParser

A = '{"name": "a", "arguments": {"x": 1}}'
B = '{"name": "b", "arguments": {}}'
CALL = ("a", '{"x": 1}')
OTHER = ("b", "{}")
TRICKY = '{"x": "}]\\"</tool_call>\\\\", "y": [{"z": "{"}]}'


def read(parser: ToolCallParser, pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls (name, arguments) of a text that comes in pieces."""
    content, calls = "", dict[int, tuple[str, str]]()
    for found in (*map(parser.feed, pieces), parser.finish()):
        content += found.content
        for index, name, arguments in found.calls:
            assert (index in calls) == (name is None)
            known, so_far = calls.get(index, (name or "", ""))
            calls[index] = (known, so_far + arguments)
    assert list(calls) == list(range(parser.count))
    return content, list(calls.values())


def check(text: str, want: tuple[str, list[tuple[str, str]]], *args: Any, **options: Any) -> None:
    """Read it whole, by character, and in two pieces with every cut."""
    cuts = [[text], list(text), *([text[:at], text[at:]] for at in range(len(text) + 1))]
    for pieces in cuts:
        assert read(ToolCallParser(*args, **options), pieces) == want, pieces


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>\n{A}\n</tool_call>", "", [CALL]),
        (f"<tool_call>{A}</tool_call>", "", [CALL]),
        (f"Let me see.\n<tool_call>\n{A}\n</tool_call>\n", "Let me see.", [CALL]),
        (f" \n<tool_call>{A}</tool_call>\n<tool_call>\n{B}</tool_call> ", "", [CALL, OTHER]),
        (f"<tool_call>{A}</tool_call>\nThen.", "Then.", [CALL]),
        (f"<tool_call>[{A}, {B}]</tool_call>", "", [CALL, OTHER]),
        # As models write them that forget what comes behind.
        (f"<tool_call>{A}", "", [CALL]),
        (f"<tool_call>{A}<tool_call>{B}", "", [CALL, OTHER]),
        (f"<tool_call>{A[:-1]}\n</tool_call> So.", "So.", [CALL]),
        (f"<tool_call>{A}</tool", "", [CALL]),
        # Other orders, other keys, other forms of arguments.
        ('<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', "", [CALL]),
        ('<tool_call>{"name": "a", "arguments": {"x": 1}, "id": "}"}</tool_call>', "", [CALL]),
        ('<tool_call>{"id": 7, "name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [CALL]),
        ('<tool_call>{"name": "b"}</tool_call>', "", [OTHER]),
        ('<tool_call>{"name" :\n"b" , "arguments":null}</tool_call>', "", [OTHER]),
        (f'<tool_call>{{"name": "b", "arguments": {TRICKY}}}</tool_call>', "", [("b", TRICKY)]),
        # A call that is cut has what came of its arguments.
        ('<tool_call>{"name": "a", "arguments": {"x', "", [("a", '{"x')]),
    ],
)
def test_marked_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(text, (content, calls), HERMES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No call. \n",
        "a < b, <tool, <tool_cal",
        "<tool_call>",
        "x <tool_call> \n",
        "<tool_call>\nget_weather</tool_call>",
        "<tool_call> { I would call }",
        '<tool_call>{"name": "a", "arg',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "a", "arguments": "five"}</tool_call>',
        '<tool_call>{"arguments": {"x": NaN}, "name": "a"}</tool_call>',
        "<tool_call>[]</tool_call>",
        '<tool_call>{"a": ' + "[" * 5000 + "]" * 5000 + "}</tool_call>",
        f"[TOOL_CALLS] [{A}]",
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_call_is_content_as_it_was_written(text: str) -> None:
    if len(text) < 1000:
        check(text, (text, []), HERMES)
    assert read(ToolCallParser(HERMES), [text]) == (text, [])


def test_what_follows_a_false_mark_is_still_read() -> None:
    check(f"<tool_call> or <tool_call>{A}", ("<tool_call> or", [CALL]), HERMES)
    check(f"<tool_call>[no <tool_call>[{A}]", ("<tool_call>[no", [CALL]), HERMES)
    check(f'<tool_call>{{"no": 1}} <tool_call>{A}', ('<tool_call>{"no": 1}', [CALL]), HERMES)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"[TOOL_CALLS] [{A}, {B}]", "", [CALL, OTHER]),
        (f"[TOOL_CALLS][{A},\n{B}]\n", "", [CALL, OTHER]),
        (f'Yes. [TOOL_CALLS] [{A[:-1]}, "id": "123456789"}}] So.', "Yes. So.", [CALL]),
        (f"[TOOL_CALLS] {A}", "", [CALL]),
        (f"[TOOL_CALLS] [{A}, {B[:12]}", "", [CALL]),
        (f"<tool_call>{A}</tool_call>", f"<tool_call>{A}</tool_call>", []),
    ],
)
def test_a_marked_list_of_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(text, (content, calls), MISTRAL)


@pytest.mark.parametrize("markers", [None, HERMES, MISTRAL])
def test_demanded_calls_need_no_mark(markers: Any) -> None:
    for text, calls in (
        (f"[{A}, {B}]", [CALL, OTHER]),
        (A, [CALL]),
        (A[:-3], [("a", '{"x": ')]),
        (A[:10], []),  # nothing to tell: it was cut
    ):
        check(text, ("", calls), markers, "calls")
    check("", ("", []), markers, "calls")
    for text in ('{"x": 1}', '{"x'):
        check(text, ("", [("a", text)]), markers, "arguments", name="a")


def test_a_demanded_call_may_be_marked_all_the_same() -> None:
    """By a forced text, which no grammar holds."""
    text = f"Well. <tool_call>{A}</tool_call>"
    check(text, ("Well.", [CALL]), HERMES, "calls")
    check(text, ("Well.", [CALL]), HERMES, "arguments", name="b")


def test_a_model_without_marks_makes_no_calls() -> None:
    text = f"<tool_call>{A}</tool_call> "
    check(text, (text, []), None)


def test_of_several_calls_the_first_alone_may_be_wanted() -> None:
    text = f"<tool_call>{A}</tool_call> And <tool_call>{B}</tool_call> so on."
    check(text, ("And so on.", [CALL]), HERMES, single=True)


def test_pieces_are_told_as_soon_as_they_can_be() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.feed("Yes, ").content == "Yes,"  # the blank may be layout
    assert parser.feed("a <").content == " a"
    assert parser.feed("b <tool").content == " <b"
    assert parser.feed('_call>{"name": "a", "arguments": ').calls == []
    assert parser.feed("{").calls == [(0, "a", ""), (0, None, "{")]
    assert parser.open
    assert parser.feed('"x": 1').calls == [(0, None, '"x": 1')]
    assert parser.feed("}").calls == [(0, None, "}")]
    assert not parser.open
    assert parser.feed("}</tool_call><tool_call>{ ").content == ""
    assert parser.feed("I ").content == "<tool_call>{ I"  # no call begins so


PARTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", A, B, A[:20], A[20:], "{", "}", "[", "]"]
PARTS += [",", " ", "\n", '"', "\\", "<", "text", '{"name": "a", "arguments": "{}"}', "\u00a0"]


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    start=st.sampled_from(["text", "calls", "arguments"]),
    markers=st.sampled_from([None, HERMES, MISTRAL]),
    single=st.booleans(),
)
def test_no_cut_changes_what_is_read(
    text: str, cuts: list[int], start: Any, markers: Any, single: bool
) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = read(ToolCallParser(markers, start, name="n", single=single), [text])
    assert read(ToolCallParser(markers, start, name="n", single=single), pieces) == whole
    assert read(ToolCallParser(markers, start, name="n", single=single), text) == whole
    if not whole[1] and start == "text":
        assert whole[0] == text
    for name, arguments in whole[1]:
        assert name
        assert arguments.startswith("{")


def test_arguments_stay_json_as_the_model_wrote_it() -> None:
    text = '{"x":1,\n "y": "\u2603"}'
    _, ((_, arguments),) = read(
        ToolCallParser(HERMES), f'<tool_call>{{"name": "a", "arguments": {text}}}</tool_call>'
    )
    assert arguments == text
    assert json.loads(arguments) == {"x": 1, "y": "\u2603"}
