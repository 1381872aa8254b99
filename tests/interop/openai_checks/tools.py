"""Checks of the `openai` client: tools."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import openai
from pydantic import BaseModel

from tests.interop.checks import Tally
from tests.interop.openai_checks.asking import At

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["town", "days"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
}
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Oslo", "days": 2}}\n</tool_call>'
)


class Town(BaseModel):
    """Arguments as the client's own helpers make them."""

    days: int
    big: bool


def required(at: At, tally: Tally) -> None:
    """tools: tool_choice required gives calls that obey their schemas, streamed or not"""
    ended = 0
    for seed in range(8):
        own = _own(at, tools=[WEATHER, CLOCK], tool_choice="required", seed=seed)
        choice = at.client.chat.completions.create(**own).choices[0]
        calls = choice.message.tool_calls
        if choice.finish_reason == "length":  # a small model may go on and on: the last is cut
            calls = calls[:-1]
        else:
            _ended_by_calls(tally, choice)
            ended += 1
        _fine(tally, calls)
        same_streamed(at, tally, own, choice)
    tally.true(ended > 4, f"{ended} of 8 answers came to an end")


def named(at: At, tally: Tally) -> None:
    """tools: a named tool_choice gives one call of it, streamed or not"""
    choice_of = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(8):
        own = _own(at, tools=[CLOCK, WEATHER], tool_choice=choice_of, seed=seed)
        choice = at.client.chat.completions.create(**own).choices[0]
        calls = choice.message.tool_calls
        tally.equal([call.function.name for call in calls], ["get_weather"], "calls")
        _fine(tally, calls)
        same_streamed(at, tally, own, choice)


def single(at: At, tally: Tally) -> None:
    """tools: parallel_tool_calls false gives one call"""
    for seed in range(8):
        own = _own(at, tools=[WEATHER], tool_choice="required", seed=seed)
        answer = at.client.chat.completions.create(**own, parallel_tool_calls=False)
        calls = answer.choices[0].message.tool_calls
        tally.equal(len(calls), 1, "calls")
        _fine(tally, calls)


def auto(at: At, tally: Tally) -> None:
    """tools: auto tells the model's own calls and content apart, streamed or not"""
    forced = {"x-force-text": quote(f"Let me see. {CALL}")}
    for more in ({}, {"tool_choice": "auto"}):
        own = _own(at, tools=[WEATHER, CLOCK], extra_headers=forced, max_tokens=200, **more)
        choice = at.client.chat.completions.create(**own).choices[0]
        _ended_by_calls(tally, choice)
        tally.equal(choice.message.content, "Let me see.", "content")
        (call,) = choice.message.tool_calls
        tally.equal(json.loads(call.function.arguments), {"town": "Oslo", "days": 2}, "arguments")
        same_streamed(at, tally, own, choice)
    plain = {"x-force-text": quote("No call.")}
    own = _own(at, tools=[WEATHER], extra_headers=plain)
    choice = at.client.chat.completions.create(**own).choices[0]
    tally.equal(choice.message.content, "No call.", "content")
    tally.equal(choice.message.tool_calls, None, "calls")
    tally.equal(choice.finish_reason, "stop", "finish_reason")
    same_streamed(at, tally, own, choice)


def none(at: At, tally: Tally) -> None:
    """tools: tool_choice none gives no calls"""
    for seed in range(4):
        own = _own(at, tools=[WEATHER], tool_choice="none", seed=seed, max_tokens=16)
        message = at.client.chat.completions.create(**own).choices[0].message
        tally.equal(message.tool_calls, None, "calls")
        tally.true(isinstance(message.content, str), "content")


def results(at: At, tally: Tally) -> None:
    """tools: a conversation with calls and their results goes on"""
    own = _own(at, tools=[WEATHER], tool_choice="required", seed=1)
    message = at.client.chat.completions.create(**own).choices[0].message
    reported = [
        {"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls
    ]
    more = [*own["messages"], message.model_dump(exclude_none=True), *reported]
    own = _own(at, tools=[WEATHER], max_tokens=8) | {"messages": more}
    answer = at.client.chat.completions.create(**own)
    tally.equal(len(answer.choices), 1, "choices")
    wrong = [*own["messages"]]
    wrong[-1 - len(reported)] = {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "x", "arguments": "{"}}
        ],
    }
    tally.raises(
        openai.BadRequestError,
        lambda: at.client.chat.completions.create(**{**own, "messages": wrong}),
        "arguments that are no JSON",
    )


def helpers(at: At, tally: Tally) -> None:
    """tools: pydantic_function_tool with parse() gives parsed arguments"""
    tool = openai.pydantic_function_tool(Town)
    for seed in range(4):
        own = _own(at, tools=[tool], tool_choice="required", seed=seed)
        answer = at.client.chat.completions.parse(**own, parallel_tool_calls=False)
        for call in answer.choices[0].message.tool_calls:
            parsed = call.function.parsed_arguments
            tally.true(isinstance(parsed, Town), f"{parsed!r} is a Town")


def same_streamed(at: At, tally: Tally, own: dict[str, Any], whole: Any) -> None:
    """A stream has the message of the whole answer, ids aside."""
    content, reason = "", None
    calls: dict[int, SimpleNamespace] = {}
    for chunk in at.client.chat.completions.create(**own, stream=True):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        content += delta.content or ""
        for piece in delta.tool_calls or ():
            call = calls.setdefault(piece.index, SimpleNamespace(id=None, name="", arguments=""))
            call.id = call.id or piece.id
            call.name += piece.function.name or ""
            call.arguments += piece.function.arguments or ""
    tally.equal(content, whole.message.content or "", "streamed content")
    tally.equal(reason, whole.finish_reason, "streamed finish_reason")
    wanted = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or ()]
    got = [(calls[i].name, calls[i].arguments) for i in sorted(calls)]
    tally.equal(got, wanted, "streamed calls")
    tally.true(all(call.id for call in calls.values()), "ids of streamed calls")


def _own(at: At, **more: Any) -> dict[str, Any]:
    return {"model": at.model, "messages": at.wanted["messages"], "max_tokens": 400, **more}


def _ended_by_calls(tally: Tally, choice: Any) -> None:
    tally.equal(choice.finish_reason, "tool_calls", "finish_reason")


def _fine(tally: Tally, calls: list[Any]) -> None:
    """Every call is one of the tools', with arguments that its schema allows."""
    tally.true(calls, "there are calls")
    tally.equal(len({call.id for call in calls}), len(calls), "ids")
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            fine = arguments["town"] in ("Paris", "Oslo") and 1 <= arguments["days"] <= 9
            tally.true(fine and len(arguments) == 2, f"get_weather({arguments})")
        else:
            tally.equal((call.function.name, arguments), ("get_time", {}), "a call")


CHECKS = (required, named, single, auto, none, results, helpers)
