"""Tools in chat, through OpenAI's own client: demanded calls, marked calls, streams, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.server.conftest import Running

FORECAST = {
    "name": "get_forecast",
    "description": "Tell the weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "units": {"type": "array", "items": {"enum": ["C", "F"]}, "maxItems": 3},
        },
        "required": ["days", "units"],
    },
}
TREE = {  # as pydantic writes a type that contains itself
    "name": "plant-tree",
    "parameters": {
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {
                    "left": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
                    "leaf": {"type": "boolean"},
                },
                "required": ["left", "leaf"],
            }
        },
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/Node"}},
        "required": ["root"],
    },
}
NOW = {"name": "now"}
TALK: Any = [{"role": "user", "content": "What is the weather?"}]
MISTRAL = (
    "{{ messages[0].content }}[AVAILABLE_TOOLS]{{ tools | tojson }}[TOOL_CALLS]"
    "{% for m in messages if m.tool_calls %}{{ m.tool_calls | tojson }}{% endfor %}"
)


def tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def named(name: str) -> dict[str, Any]:
    return tool({"name": name})


TOOLS = [tool(FORECAST), tool(TREE), tool(NOW)]


def is_tree(node: Any) -> bool:
    return (
        set(node) == {"left", "leaf"}
        and isinstance(node["leaf"], bool)
        and (node["left"] is None or is_tree(node["left"]))
    )


def check_arguments(name: str, text: str) -> None:
    """That these are arguments of a function of `TOOLS`, and that there are no others."""
    reported = json.loads(text)
    if name == "get_forecast":
        assert set(reported) == {"days", "units"}
        assert type(reported["days"]) is int
        assert 0 <= reported["days"] <= 99
        assert len(reported["units"]) <= 3
        assert set(reported["units"]) <= {"C", "F"}
    elif name == "plant-tree":
        assert set(reported) == {"root"}
        assert is_tree(reported["root"])
    else:
        assert (name, reported) == ("now", {})


def ask(served: Running, force: str | None = None, **options: Any) -> Any:
    """Of a server with injection, a text may be forced."""
    asked: Any = {"model": "tiny", "messages": TALK, "max_tokens": 400, "tools": TOOLS, **options}
    headers = None if force is None else {"x-force-text": quote(force)}
    return served.openai.chat.completions.create(**asked, extra_headers=headers)


@pytest.fixture(scope="module")
def forcing(start: Callable[..., Running]) -> Running:
    return start({"inject": "on"})


@pytest.fixture(scope="module")
def mistral(
    start: Callable[..., Running], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """Whose template marks calls with words that are no tokens."""
    folder = tmp_path_factory.mktemp("mistral") / "tiny"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(MISTRAL, encoding="utf-8")
    return start({"inject": "on"}, folder)


# Demanded calls: whatever the weights


def test_required_calls_are_valid_whatever_the_weights(served: Running) -> None:
    ids, names, numbers = set(), set(), set()
    for seed in range(12):
        done = ask(served, tool_choice="required", temperature=1.5, seed=seed)
        (choice,) = done.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        for call in choice.message.tool_calls:
            assert call.type == "function"
            assert re.fullmatch("call_[0-9a-f]{24}", call.id)
            check_arguments(call.function.name, call.function.arguments)
            ids.add(call.id)
            names.add(call.function.name)
        numbers.add(len(choice.message.tool_calls))
    assert len(ids) >= 12
    assert names == {"get_forecast", "plant-tree", "now"}
    assert 1 in numbers
    assert max(numbers) > 1


def test_a_list_of_calls_has_an_end(served: Running) -> None:
    """At temperature 0 these weights would write one call after the other for ever."""
    (choice,) = ask(served, tools=[tool(NOW)], tool_choice="required", temperature=0).choices
    assert choice.finish_reason == "tool_calls"
    assert len(choice.message.tool_calls) == 16


def test_one_call_where_several_are_not_wanted(served: Running) -> None:
    for seed in range(6):
        done = ask(served, tool_choice="required", parallel_tool_calls=False, seed=seed)
        (call,) = done.choices[0].message.tool_calls
        check_arguments(call.function.name, call.function.arguments)
        assert done.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("function", [FORECAST, TREE, NOW], ids=lambda function: function["name"])
def test_a_named_function_is_called_once(served: Running, function: dict[str, Any]) -> None:
    """Its finish_reason is 'stop', as that of the remote API."""
    for seed in range(4):
        done = ask(served, tool_choice=named(function["name"]), seed=seed)
        (choice,) = done.choices
        (call,) = choice.message.tool_calls
        assert call.function.name == function["name"]
        check_arguments(function["name"], call.function.arguments)
        assert (choice.finish_reason, choice.message.content) == ("stop", None)
    # The model sees the others, too.
    assert done.usage.prompt_tokens == ask(served, max_tokens=1).usage.prompt_tokens


def test_some_tools_may_be_allowed(served: Running) -> None:
    allowed = {"mode": "required", "tools": [named("now"), named("get_forecast")]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    names = {
        call.function.name
        for seed in range(8)
        for call in ask(served, tool_choice=choice, seed=seed).choices[0].message.tool_calls
    }
    assert names == {"get_forecast", "now"}
    # The model sees no others.
    want = ask(served, tools=[tool(FORECAST), tool(NOW)], max_tokens=1).usage.prompt_tokens
    auto = {"type": "allowed_tools", "allowed_tools": {**allowed, "mode": "auto"}}
    assert ask(served, tool_choice=auto, max_tokens=1).usage.prompt_tokens == want


def test_a_call_that_is_cut_tells_what_there_is(served: Running) -> None:
    for choice in ("required", named("get_forecast")):
        options = {"tool_choice": choice, "seed": 3, "temperature": 1, "parallel_tool_calls": False}
        whole = ask(served, **options)
        (full,) = whole.choices[0].message.tool_calls
        lengths = []
        for tokens in range(1, whole.usage.completion_tokens, 3):
            (cut,) = ask(served, **options, max_tokens=tokens).choices
            assert cut.finish_reason == "length"
            assert cut.message.content is None
            calls = cut.message.tool_calls or ()
            assert all(call.function.name == full.function.name for call in calls)
            (reported,) = [call.function.arguments for call in calls] or [""]
            assert full.function.arguments.startswith(reported)
            lengths.append(len(reported))
        assert lengths == sorted(lengths)
        assert 0 < lengths[-1] <= len(full.function.arguments)
        if choice != "required":
            assert 0 not in lengths  # its name is known from the first token on


# Streams


def collected(chunks: list[Any], index: int) -> tuple[dict[str, Any], str | None]:
    """The message that a choice's chunks make, without ids, and its finish_reason."""
    own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
    content, calls = None, list[dict[str, str]]()
    for number, choice in enumerate(own):
        delta = choice.delta
        assert delta.role == (None if number else "assistant")
        if delta.content is not None:
            content = (content or "") + delta.content
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls)
                assert call.type == "function"
                assert call.function.arguments == ""
                calls.append({"name": call.function.name, "arguments": ""})
            else:
                assert call.index == len(calls) - 1
                assert (call.type, call.function.name) == (None, None)
                assert call.function.arguments
            calls[-1]["arguments"] += call.function.arguments
        assert len(delta.tool_calls or ()) <= 1
    assert [c.finish_reason for c in own[:-1]] == [None] * (len(own) - 1)
    return {"content": content, "calls": calls}, own[-1].finish_reason


def reported(choice: Any) -> tuple[dict[str, Any], str]:
    """The same of a whole answer."""
    calls = [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in choice.message.tool_calls or ()
    ]
    return {"content": choice.message.content, "calls": calls}, choice.finish_reason


@pytest.mark.parametrize("choice", ["required", named("get_forecast"), "none", None], ids=str)
@pytest.mark.parametrize("max_tokens", [100, 9])
def test_a_stream_is_the_same_in_pieces(served: Running, choice: Any, max_tokens: int) -> None:
    options: Any = {"n": 3, "temperature": 1.5, "seed": 4, "logprobs": True, "top_logprobs": 1}
    options |= {"max_tokens": max_tokens} | ({} if choice is None else {"tool_choice": choice})
    whole = ask(served, **options)
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks.pop().usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.choices for chunk in chunks)
    for own in whole.choices:
        assert collected(chunks, own.index) == reported(own)
        pieces = [c.choices[0].logprobs for c in chunks if c.choices[0].index == own.index]
        assert [t for p in pieces if p for t in p.content] == own.logprobs.content
    assert [c.routing["name"] for c in chunks if getattr(c, "routing", None)] == ["full"]
    plain = list(ask(served, stream=True, **{**options, "logprobs": False, "top_logprobs": None}))
    for own in whole.choices:
        assert collected(plain, own.index) == reported(own)
    ids = [c.id for chunk in chunks for c in chunk.choices[0].delta.tool_calls or () if c.id]
    assert len(set(ids)) == len(ids) == sum(len(o.message.tool_calls or ()) for o in whole.choices)


def test_the_clients_own_helper_reads_the_stream(served: Running) -> None:
    options: Any = {"tool_choice": "required", "seed": 2, "temperature": 1}
    (want,) = ask(served, **options).choices
    with served.openai.chat.completions.stream(
        model="tiny", messages=TALK, tools=TOOLS, max_tokens=400, **options
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        (choice,) = stream.get_final_completion().choices
    assert reported(choice) == reported(want)
    assert [(event.name, event.arguments) for event in done] == [
        (call.function.name, call.function.arguments) for call in want.message.tool_calls
    ]


# Calls that the model makes by itself

A = '{"name": "get_forecast", "arguments": {"days": 3, "units": ["C"]}}'
B = '{"name": "now", "arguments": {}}'
CALLS = [
    {"name": "get_forecast", "arguments": '{"days": 3, "units": ["C"]}'},
    {"name": "now", "arguments": "{}"},
]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>", None, CALLS),
        (
            f"Let me \N{SNOWMAN} see.\n<tool_call>{B}</tool_call>",
            "Let me \N{SNOWMAN} see.",
            CALLS[1:],
        ),
        ("No <tool_call> at all.\n", "No <tool_call> at all.\n", []),
        ("Plain.", "Plain.", []),
    ],
    ids=["two", "content", "none", "plain"],
)
@pytest.mark.parametrize("demand", [{}, {"tool_choice": "auto"}, {"tool_choice": "required"}])
def test_marked_calls_are_read_though_marks_are_special_tokens(
    forcing: Running, text: str, content: str | None, calls: Any, demand: dict[str, Any]
) -> None:
    mark = forcing.engine.encode("<tool_call>")[-1]
    assert mark in forcing.engine.tokenizer.special_ids
    done = ask(forcing, text, **demand)
    want = {"content": content, "calls": calls}
    assert reported(done.choices[0]) == (want, "tool_calls" if calls else "stop")
    chunks = list(ask(forcing, text, stream=True, **demand))
    assert collected(chunks, 0) == (want, "tool_calls" if calls else "stop")


def test_marks_of_another_template_and_ids_that_it_takes(mistral: Running) -> None:
    few = [tool(NOW)]  # its prompt has them whole
    text = f"So: [TOOL_CALLS] [{A}, {B}]"
    want = ({"content": "So:", "calls": CALLS}, "tool_calls")
    done = ask(mistral, text, tools=few)
    assert reported(done.choices[0]) == want
    assert all(re.fullmatch("[0-9a-f]{9}", c.id) for c in done.choices[0].message.tool_calls)
    assert collected(list(ask(mistral, text, tools=few, stream=True)), 0) == want
    other = f"<tool_call>{B}</tool_call>"
    assert ask(mistral, other, tools=few).choices[0].message.tool_calls is None
    none = ask(mistral, text, tools=few, tool_choice="none").choices[0]
    assert (none.message.content, none.finish_reason) == (text, "stop")


def test_only_the_first_of_marked_calls_where_several_are_not_wanted(forcing: Running) -> None:
    text = f"<tool_call>{A}</tool_call><tool_call>{B}</tool_call>"
    done = ask(forcing, text, parallel_tool_calls=False)
    assert reported(done.choices[0])[0]["calls"] == CALLS[:1]


def test_without_tools_or_with_none_wanted_no_calls_are_read(forcing: Running) -> None:
    text = f"See <tool_call>{B}</tool_call>"
    bare: Any = {"model": "tiny", "messages": TALK, "max_tokens": 400}
    headers = {"x-force-text": quote(text)}
    plain = forcing.openai.chat.completions.create(**bare, extra_headers=headers).choices[0]
    assert plain.message.content == f"See {B}"  # special tokens are no text
    none = ask(forcing, text, tool_choice="none")
    assert reported(none.choices[0]) == reported(plain)
    assert "tool_calls" not in none.choices[0].message.model_fields_set
    assert none.usage.prompt_tokens == ask(forcing, text).usage.prompt_tokens
    assert ask(forcing, "<|reserved_0|>").choices[0].message.content == ""


def test_a_marked_call_that_is_cut_is_no_whole_one(forcing: Running) -> None:
    text = f"<tool_call>{A}"
    last = len(forcing.engine.tokenizer.encode(text, add_special_tokens=False))
    for tokens in range(1, last, 3):
        (choice,) = ask(forcing, text, max_tokens=tokens).choices
        assert choice.finish_reason == "length"
        chunks = list(ask(forcing, text, max_tokens=tokens, stream=True))
        assert collected(chunks, 0) == reported(choice)
    assert ask(forcing, text, max_tokens=last).choices[0].finish_reason == "tool_calls"
    assert ask(forcing, text, stop=["units"]).choices[0].finish_reason == "stop"
    (choice,) = ask(forcing, f"{text}</tool_call>", max_tokens=last).choices
    assert choice.finish_reason == "length"  # the call is whole, but not what it was part of


# What the model is told


def test_tools_and_earlier_calls_reach_the_template(served: Running, mistral: Running) -> None:
    def call(arguments: str) -> dict[str, Any]:
        function = {"name": "get_forecast", "arguments": arguments}
        return {"id": "call_1", "type": "function", "function": function}

    def talk(calls: list[Any]) -> Any:
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        return [*TALK, answer, {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"}]

    given = talk([call('{"days": 3}'), call("")])
    read = talk([call({"days": 3}), call({})])  # type: ignore[arg-type]
    read[1]["content"] = ""
    told_tools = [
        tool({"name": "get_forecast", **{k: FORECAST[k] for k in ("description", "parameters")}}),
        tool(
            {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
        ),
    ]
    for own in (served, mistral):
        done = ask(
            own, max_tokens=1, messages=given, tools=[tool({**FORECAST, "strict": True}), tool(NOW)]
        )
        ids = own.engine.tokenizer.encode_chat(read, tools=told_tools)
        assert done.usage.prompt_tokens == len(ids)
    text = mistral.engine.tokenizer.render_chat(read, tools=told_tools)
    assert '"arguments": {"days": 3}' in text
    mine = served.engine.tokenizer.render_chat(read, tools=told_tools)
    assert "- get_forecast(days, units): Tell the weather.\n" in mine
    assert '<tool_call>\n{"name": "get_forecast", "arguments": {"days": 3}}\n</tool_call>' in mine


def test_what_a_request_may_not_say_of_tools(served: Running) -> None:
    def refused(**body: Any) -> dict[str, Any]:
        asked = {"messages": TALK, "tools": TOOLS, **body}
        return served.refused(400, "/v1/chat/completions", **asked)

    def with_parameters(parameters: Any) -> str:
        own = [tool({"name": "f", "parameters": parameters})]
        return str(refused(tools=own, tool_choice="required")["message"])

    assert refused(tools=..., tool_choice="auto")["message"] == "tool_choice needs tools."
    assert refused(tools=..., parallel_tool_calls=True)["param"] == "parallel_tool_calls"
    assert refused(tools=[])["param"] == "tools"
    assert refused(tools=[tool(NOW)] * 129)["param"] == "tools"
    assert refused(tools=[tool(NOW), tool(NOW)])["message"] == "tools has now more than once."
    assert "which is none of tools" in refused(tool_choice=named("then"))["message"]
    assert refused(tool_choice="always")["param"].startswith("tool_choice")
    for name in ("", "a b", "a" * 65, "\u00e9", "a\n"):
        assert refused(tools=[tool({"name": name})])["param"] == "tools.0.function.name"
    assert "custom" in refused(tools=[{"type": "custom", "custom": {}}])["message"]
    wanted = {"type": "json_object"}
    for choice in ("required", named("now")):
        error = refused(response_format=wanted, tool_choice=choice)
        assert (error["param"], "demands a call" in error["message"]) == ("response_format", True)
    assert "schema of type 'object', got 'string'" in with_parameters({"type": "string"})
    assert "cannot be followed" in with_parameters({"properties": {"x": {"type": "thing"}}})
    assert "cannot be followed" in with_parameters({"properties": {"x": {"$ref": "#/$defs/no"}}})
    for depth in (10, 100, 200, 300, 400):
        deep: Any = {"type": "object"}
        for _ in range(depth):
            deep = {"properties": {"x": deep}, "required": ["x"]}
        answer = served.post(
            "/v1/chat/completions",
            model="tiny",
            messages=TALK,
            max_tokens=5,
            tools=[tool({"name": "f", "parameters": deep})],
            tool_choice="required",
        )
        assert answer.status_code == (200 if depth == 10 else 400), depth
    assert "chat_template_kwargs" in refused(chat_template_kwargs={"tools": []})["message"]
    for arguments in ("{", "[1]", "null", "[" * 100_000):
        function = {"name": "now", "arguments": arguments}
        call = {"id": "x", "type": "function", "function": function}
        error = refused(messages=[*TALK, {"role": "assistant", "tool_calls": [call]}])
        assert error["param"] == "messages.1.tool_calls"
        assert "must be a JSON object as text" in error["message"]


def test_json_may_be_asked_for_where_calls_are_not_demanded(served: Running) -> None:
    done = ask(served, response_format={"type": "json_object"}, seed=1, temperature=1)
    assert done.choices[0].message.content.startswith("{")
    assert done.choices[0].message.tool_calls is None


def test_the_description_tells_of_tools(served: Running) -> None:
    schemas = served.http.get("/openapi.json").json()["components"]["schemas"]
    assert {"Tool", "ToolCall", "NamedTool", "AllowedToolChoice"} <= set(schemas)
    reasons = schemas["ChatChoice"]["properties"]["finish_reason"]["enum"]
    assert reasons == ["stop", "length", "tool_calls"]
    assert "tool_calls" in schemas["AssistantMessage"]["properties"]
