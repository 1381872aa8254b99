"""Chat through OpenAI's own client: answers, streams, options."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elastic_moe import SamplingParams
from elastic_moe.protocol.chat import Message
from elastic_moe.server.api.chat import template_messages
from tests.server.conftest import Running

TALK: Any = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a set?"}],
    },
]
PLAIN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a set?"}]


def ask(served: Running, **options: Any) -> Any:
    asked: Any = {"model": "tiny", "messages": TALK, "max_tokens": 8, "temperature": 0, **options}
    return served.openai.chat.completions.create(**asked)


def test_an_answer_is_the_engines(served: Running) -> None:
    ids = served.engine.tokenizer.encode_chat(PLAIN)
    want = served.engine.generate(ids, "L3-k2", SamplingParams(max_tokens=8))
    for knobs in (
        {"model": "tiny@L3-k2"},
        {"extra_body": {"routing_config": {"depth": 3, "topK": 2}}},
    ):
        done = ask(served, **knobs)
        assert done.choices[0].message.content == want.text
        assert done.choices[0].finish_reason == want.finish_reason
        assert done.model == knobs.get("model", "tiny")
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), 8)
        assert done.usage.total_tokens == len(ids) + 8
        assert done.routing["name"] == "L3-k2"
        assert done.routing["model"] == "tiny"
        assert done.routing["mean_experts"] == want.routing.mean_experts
        assert done.routing["flops_per_token"] == want.routing.flops_per_token


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_same_in_pieces(served: Running, n: int) -> None:
    options: Any = {"n": n, "temperature": 1.5, "seed": 5, "logprobs": True, "top_logprobs": 2}
    whole = ask(served, **options)
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}, **options))
    usage = chunks.pop()
    assert usage.choices == []
    assert usage.usage.completion_tokens == 8 * n == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in [*chunks, usage]}) == 1
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.delta.role for c in own] == ["assistant"] + [None] * (len(own) - 1)
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["length"]
        reported = [t for c in own if c.logprobs for t in c.logprobs.content]
        assert reported == choice.logprobs.content
    routed = [c for c in chunks if getattr(c, "routing", None)]
    assert [c.routing["name"] for c in routed] == ["full"]
    assert routed == chunks[-1:]


def test_a_stream_is_events_and_nothing_else(served: Running) -> None:
    body = {"messages": PLAIN, "max_tokens": 3, "ignore_eos": True, "stream": True}
    answer = served.post("/v1/chat/completions", model="tiny@k1", **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-elastic-subnet"] == "k1"
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    bodies = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {body["object"] for body in bodies} == {"chat.completion.chunk"}
    assert all(body["choices"] for body in bodies)  # no usage that nobody asked for
    assert bodies[-1]["choices"][0]["finish_reason"] == "length"


def test_a_seed_makes_an_answer_again(served: Running) -> None:
    def text(**options: Any) -> str:
        long = {"max_tokens": 20, "extra_body": {"ignore_eos": True}}
        return ask(served, temperature=2.0, **long, **options).choices[0].message.content

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text(seed=-1) == text(seed=2**64 - 1)


def test_log_probabilities_tell_tokens_by_text_and_bytes(served: Running) -> None:
    ids = served.engine.tokenizer.encode_chat(PLAIN)
    done = ask(served, logprobs=True, top_logprobs=3)
    rows = served.engine.generate(ids, None, SamplingParams(max_tokens=8, logprobs=3))
    content = done.choices[0].logprobs.content
    assert [t.logprob for t in content] == [t.logprob for t in rows.logprobs or ()]
    joined = b"".join(bytes(t.bytes) for t in content)
    assert joined.decode(errors="replace") == done.choices[0].message.content
    assert [len(t.top_logprobs) for t in content] == [3] * 8
    for reported in content:
        assert reported.top_logprobs[0].logprob >= reported.top_logprobs[1].logprob
        best = reported.top_logprobs[0]
        assert (best.token, best.bytes, best.logprob) == (
            reported.token,
            reported.bytes,
            reported.logprob,
        )
    assert ask(served, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(served).choices[0].logprobs is None


def test_stop_texts_biases_and_limits(served: Running) -> None:
    whole = ask(served).choices[0].message.content
    stopped = ask(served, stop=[whole[3:5]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (
        whole[: whole.find(whole[3:5])],
        "stop",
    )
    (banned,) = served.engine.tokenizer.encode("a", add_special_tokens=False)
    biased = ask(served, logit_bias={str(banned): 100})
    assert biased.choices[0].message.content == "a" * 8
    limit = ask(served, max_tokens=None, max_completion_tokens=3)
    assert limit.usage.completion_tokens == 3


def test_json_comes_when_it_is_asked_for(served: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    asked = {
        "type": "json_schema",
        "json_schema": {"name": "vote", "schema": schema, "strict": True},
    }
    done = ask(served, response_format=asked, max_tokens=60).choices[0]
    assert done.finish_reason == "stop"
    assert set(json.loads(done.message.content)) == {"yes"}
    free = ask(served, response_format={"type": "json_object"}, max_tokens=300).choices[0]
    assert free.message.content.startswith("{")


def test_what_a_conversation_may_not_be(served: Running) -> None:
    def refused(status: int = 400, **body: Any) -> dict[str, Any]:
        asked = {"messages": PLAIN, **body}
        return served.refused(status, "/v1/chat/completions", **asked)

    assert refused(messages=[])["param"] == "messages"
    assert refused(messages=[{"role": "wizard", "content": "x"}])["param"] == "messages.0.role"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "image_url" in refused(messages=[{"role": "user", "content": image}])["message"]
    assert "name one limit" in refused(max_tokens=3, max_completion_tokens=4)["message"]
    assert "needs logprobs" in refused(top_logprobs=2)["message"]
    assert "needs stream" in refused(stream_options={"include_usage": True})["message"]
    assert "must not name messages" in refused(chat_template_kwargs={"messages": []})["message"]
    assert "Unicode" in refused(messages=[{"role": "user", "content": "\ud800"}])["message"]
    long = refused(messages=[{"role": "user", "content": "word " * 3000}])
    assert long["code"] == "context_length_exceeded"
    limit = served.engine.config.max_positions
    assert f"{limit} positions" in long["message"]
    assert refused(messages=PLAIN, max_tokens=limit)["code"] == "context_length_exceeded"


def test_messages_come_to_the_template_as_it_knows_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reported = [
        Message.model_validate(message)
        for message in (
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant"},
        )
    ]
    assert template_messages(reported) == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "ab", "name": "ann"},
        {"role": "assistant", "content": ""},
    ]
