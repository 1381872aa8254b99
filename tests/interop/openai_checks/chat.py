"""Checks of the `openai` client: chat."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import BaseModel, Field

from tests.interop.checks import Tally
from tests.interop.openai_checks.asking import (
    At,
    chat_arguments,
    routing_of,
    same_account,
    same_choices,
    same_routing,
    spellings,
)


class Thing(BaseModel):
    """What `parse` makes of an answer."""

    kind: Literal["whale", "snow"]
    count: int = Field(ge=0, le=99)
    big: bool


def subnets(at: At, tally: Tally) -> None:
    """chat: every spelling of a sub-network gives the engine's text, logprobs, usage, routing."""
    for case in at.wanted["chat_subnets"]:
        for model, more in spellings(case, at.model):
            own = chat_arguments({**case, "body": {**case["body"], **more}}, model)
            answer = at.client.chat.completions.create(**own)
            same_choices(tally, answer.choices, case, chat=True)
            same_account(tally, answer, case)
            tally.equal(answer.model, model, "model is the name that was asked for")
            tally.equal(answer.object, "chat.completion", "object")
            tally.equal(answer.choices[0].message.role, "assistant", "role")


def options(at: At, tally: Tally) -> None:
    """chat: every option of sampling gives the engine's choices, streamed or not."""
    for case in at.wanted["chat_options"]:
        own = chat_arguments(case, f"{at.model}@{case['subnet']}")
        answer = at.client.chat.completions.create(**own)
        same_choices(tally, answer.choices, case, chat=True)
        same_account(tally, answer, case)
        choices, last = join(at.client.chat.completions.create(**own, stream=True))
        same_choices(tally, choices, case, chat=True)
        same_routing(tally, routing_of(last), case)
        del own["logprobs"], own["top_logprobs"]
        choices, _ = join(at.client.chat.completions.create(**own, stream=True))
        same_choices(tally, choices, _without_logprobs(case), chat=True)


def limits(at: At, tally: Tally) -> None:
    """chat: max_completion_tokens is max_tokens; without either, the model's end ends it."""
    case = at.wanted["chat_subnets"][0]
    own = chat_arguments(case, at.model)
    own["max_completion_tokens"] = own.pop("max_tokens")
    answer = at.client.chat.completions.create(**own)
    same_choices(tally, answer.choices, case, chat=True)
    # Biased to its end tokens at once.
    ends = {"1": 100, "4": 100}
    del own["max_completion_tokens"]
    answer = at.client.chat.completions.create(**own, logit_bias=ends)
    tally.equal(answer.choices[0].finish_reason, "stop", "ends by itself")
    tally.equal(answer.choices[0].message.content, "", "an end has no text")


def seeds(at: At, tally: Tally) -> None:
    """chat: a seed gives the same answer again, another seed or none another one."""
    own = {"model": at.model, "messages": at.wanted["messages"], "max_tokens": 16}

    def text(**more: Any) -> str:
        answer = at.client.chat.completions.create(**own, **more)
        return str(answer.choices[0].message.content)

    tally.equal(text(seed=5), text(seed=5), "the same seed")
    tally.true(text(seed=5) != text(seed=6), "another seed gives another text")
    tally.true(len({text() for _ in range(4)}) > 1, "no seed gives other texts")
    tally.equal(len({text(temperature=0) for _ in range(3)}), 1, "texts at temperature 0")
    tally.equal(text(temperature=0, seed=1), text(temperature=0, seed=2), "temperature 0")


def streams(at: At, tally: Tally) -> None:
    """chat: a stream begins with the role, ends with routing, has usage only if asked for."""
    case = at.wanted["chat_subnets"][1]
    own = chat_arguments(_without_logprobs(case), f"{at.model}@{case['subnet']}")
    for usage in (False, True):
        more = {"stream_options": {"include_usage": True}} if usage else {}
        chunks = list(at.client.chat.completions.create(**own, **more, stream=True))
        tally.equal(len({chunk.id for chunk in chunks}), 1, "ids of a stream")
        tally.equal({c.object for c in chunks}, {"chat.completion.chunk"}, "objects")
        roles = [c.choices[0].delta.role for c in chunks if c.choices]
        tally.equal(roles, ["assistant"] + [None] * (len(roles) - 1), "roles")
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        tally.equal(reasons[:-1], [None] * (len(reasons) - 1), "finish_reason before the end")
        reported = [bool(routing_of(chunk)) for chunk in chunks if chunk.choices]
        tally.equal(reported, [False] * (len(reported) - 1) + [True], "chunks with routing")
        usages = [chunk for chunk in chunks if chunk.usage is not None]
        tally.equal(len(usages), int(usage), "chunks with usage")
        if usage:
            tally.equal(chunks[-1].choices, [], "choices of the chunk with usage")
            got = (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens)
            wanted = (case["wanted"]["prompt_tokens"], case["wanted"]["completion_tokens"])
            tally.equal(got, wanted, "usage of a stream")


def stream_helper(at: At, tally: Tally) -> None:
    """chat: client.chat.completions.stream() collects what the whole answer has."""
    for case in at.wanted["chat_options"]:
        if case["wanted"]["choices"][0]["finish_reason"] != "stop":
            continue  # which this helper takes for a failure
        own = chat_arguments(case, f"{at.model}@{case['subnet']}")
        with at.client.chat.completions.stream(**own) as stream:
            text = "".join(event.delta for event in stream if event.type == "content.delta")
            done = stream.get_final_completion()
        tally.equal(text, case["wanted"]["choices"][0]["text"], "deltas")
        same_choices(tally, done.choices, case, chat=True)


def formats(at: At, tally: Tally) -> None:
    """chat: response_format gives the engine's JSON, which parses"""
    for case in at.wanted["chat_formats"]:
        own = chat_arguments(case, at.model)
        answer = at.client.chat.completions.create(**own)
        same_choices(tally, answer.choices, case, chat=True)
        read = json.loads(answer.choices[0].message.content)
        tally.true(isinstance(read, dict), f"{case['what']}: {read!r} is an object")
        choices, _ = join(at.client.chat.completions.create(**own, stream=True))
        same_choices(tally, choices, case, chat=True)
        if case["what"] == "json_schema":
            Thing.model_validate(read)
    plain = at.wanted["chat_subnets"][0]
    own = chat_arguments(plain, at.model)
    answer = at.client.chat.completions.create(**own, response_format={"type": "text"})
    same_choices(tally, answer.choices, plain, chat=True)


def parse(at: At, tally: Tally) -> None:
    """chat: client.chat.completions.parse() makes pydantic objects, whatever the seed."""
    for seed in range(10):
        answer = at.client.chat.completions.parse(
            model=f"{at.model}@L36",
            messages=at.wanted["messages"],
            response_format=Thing,
            seed=seed,
            max_tokens=100,
        )
        thing = answer.choices[0].message.parsed
        tally.true(isinstance(thing, Thing), f"seed {seed}: {thing!r} is a Thing")


def conversations(at: At, tally: Tally) -> None:
    """chat: parts of text are their text, developer is system, ignored keys change nothing."""
    case = at.wanted["chat_subnets"][0]
    own = chat_arguments(case, at.model)
    system, user = case["body"]["messages"]
    halves = [{"type": "text", "text": text} for text in (user["content"][:9], user["content"][9:])]
    for messages in (
        [system, {"role": "user", "content": halves}],
        [{**system, "role": "developer"}, user],
        [system, {**user, "name": "somebody"}],
    ):
        answer = at.client.chat.completions.create(**{**own, "messages": messages})
        same_choices(tally, answer.choices, case, chat=True)
    answer = at.client.chat.completions.create(
        **own, user="me", store=False, metadata={"a": "b"}, service_tier="auto"
    )
    same_choices(tally, answer.choices, case, chat=True)
    longer = [system, user, {"role": "assistant", "content": "A list."}, user]
    answer = at.client.chat.completions.create(**{**own, "messages": longer})
    more = answer.usage.prompt_tokens > case["wanted"]["prompt_tokens"]
    tally.true(more, "a longer conversation has more tokens")


def names(at: At, tally: Tally) -> None:
    """chat: aliases, suffixes and profiles name the same model."""
    case = at.wanted["chat_subnets"][0]
    own = chat_arguments(case, "ernie-5.1-prod")
    answer = at.client.chat.completions.create(**own)
    same_choices(tally, answer.choices, case, chat=True)
    tally.equal(answer.model, "ernie-5.1-prod", "model")
    tally.equal(routing_of(answer)["model"], at.model, "the checkpoint's own name")
    for own["model"], more in (
        (at.model, {"extra_body": {"profile": "deterministic"}}),
        (f"{at.model}@deterministic", {}),
    ):
        answer = at.client.chat.completions.create(**own, **more)
        same_choices(tally, answer.choices, case, chat=True)
        tally.equal(routing_of(answer).get("profile"), "deterministic", "profile")


def join(stream: Any) -> tuple[list[Any], Any]:
    """A stream's choices, put together as a whole answer has them; and its last chunk."""
    found: dict[int, SimpleNamespace] = {}
    chunk = None
    for chunk in stream:
        for piece in chunk.choices:
            message = SimpleNamespace(content="")
            empty = SimpleNamespace(
                index=piece.index, message=message, finish_reason=None, logprobs=None
            )
            own = found.setdefault(piece.index, empty)
            own.message.content += piece.delta.content or ""
            own.finish_reason = piece.finish_reason or own.finish_reason
            if piece.logprobs is not None:
                own.logprobs = own.logprobs or SimpleNamespace(content=[])
                own.logprobs.content += piece.logprobs.content
    return [found[index] for index in sorted(found)], chunk


def _without_logprobs(case: dict[str, Any]) -> dict[str, Any]:
    wanted = case["wanted"]
    bare = [{**choice, "logprobs": None} for choice in wanted["choices"]]
    return {**case, "top": None, "wanted": {**wanted, "choices": bare}}


CHECKS = (
    subnets,
    options,
    limits,
    seeds,
    streams,
    stream_helper,
    formats,
    parse,
    conversations,
    names,
)
