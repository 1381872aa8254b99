"""Texts through OpenAI's own client: lists, token ids, echo, log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_moe import SamplingParams
from tests.logprobs import log_softmax
from tests.server.conftest import Running

PATH = "/v1/completions"
LENGTH: dict[str, Any] = {"temperature": 0, "max_tokens": 5}


def test_prompts_are_a_text_ids_or_lists_of_them(served: Running) -> None:
    texts = ["The with statement", "def ", "A"]
    ids = [served.engine.encode(text) for text in texts]
    want = [served.engine.generate(own, None, SamplingParams(max_tokens=5)).text for own in ids]
    for prompts in (texts, ids):
        done = served.complete(prompts, **LENGTH)
        assert [c["text"] for c in done["choices"]] == want
        assert [c["index"] for c in done["choices"]] == [0, 1, 2]
        assert done["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert done["usage"]["completion_tokens"] == 15
        for prompt, text in zip(prompts, want, strict=True):
            assert served.complete(prompt, **LENGTH)["choices"][0]["text"] == text


def test_choices_of_several_prompts_are_numbered_in_their_order(served: Running) -> None:
    body: Any = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 5, "logprobs": 1}
    whole = served.complete(["The", "A"], **body)["choices"]
    alone = [served.complete(prompt, **body)["choices"] for prompt in ("The", "A")]
    assert [c["index"] for c in whole] == [0, 1, 2, 3]
    assert [c["text"] for c in whole] == [c["text"] for own in alone for c in own]
    answer = served.openai.completions.create(
        model="tiny",
        prompt=["The", "A"],
        stream=True,
        stream_options={"include_usage": True},
        **body,
    )
    *chunks, usage = list(answer)
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 20
    for choice in whole:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice["index"]]
        assert "".join(c.text for c in own) == choice["text"]
        assert own[-1].finish_reason == "length"
        reported = [c.logprobs for c in own if c.logprobs]
        for part in ("tokens", "token_logprobs", "text_offset"):
            assert [x for t in reported for x in getattr(t, part)] == choice["logprobs"][part]
    names = [c.routing["name"] for c in chunks if getattr(c, "routing", None)]  # type: ignore[attr-defined]
    assert names == ["full", "full"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt(served: Running, stream: bool) -> None:
    prompt = "The \N{SNOWMAN} of"
    plain = served.complete(prompt, **LENGTH)["choices"][0]["text"]
    if not stream:
        assert served.complete(prompt, echo=True, **LENGTH)["choices"][0]["text"] == prompt + plain
        return
    events = served.events(PATH, model="tiny", prompt=prompt, echo=True, **LENGTH)
    pieces = [event["choices"][0]["text"] for event in events]
    assert "".join(pieces) == prompt + plain


def test_log_probabilities_of_a_prompt_are_those_of_scoring(served: Running) -> None:
    """As lm-evaluation-harness reads them."""
    prompt = "The \N{SNOWMAN} of the set"
    ids = served.engine.encode(prompt)
    rows = log_softmax(served.engine.score(ids, "L3-w4"))
    choice = served.complete(
        ids, model="tiny@L3-w4", echo=True, logprobs=1, max_tokens=1, temperature=0
    )["choices"][0]
    reported = choice["logprobs"]
    assert reported["token_logprobs"][0] is reported["top_logprobs"][0] is None
    assert len(reported["tokens"]) == len(ids) + 1 == len(reported["text_offset"])
    for i, token in enumerate(ids[1:], 1):
        assert reported["token_logprobs"][i] == pytest.approx(float(rows[i - 1, token]), abs=1e-4)
        (best,) = reported["top_logprobs"][i].values()
        assert best == pytest.approx(float(rows[i - 1].max()), abs=1e-4)
    assert reported["token_logprobs"][-1] == pytest.approx(float(rows[-1].max()), abs=1e-4)
    for i, offset in enumerate(reported["text_offset"]):
        if reported["tokens"][i].isascii() and not reported["tokens"][i].startswith(
            ("bytes:", "<|")
        ):
            assert choice["text"][offset:].startswith(reported["tokens"][i])


def joined(events: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """The choice that the events of a stream make."""
    own = [c for event in events for c in event["choices"] if c["index"] == index]
    reported = [c["logprobs"] for c in own if c["logprobs"] is not None]
    parts = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    lists = {part: [value for piece in reported for value in piece[part]] for part in parts}
    return {
        "index": index,
        "text": "".join(c["text"] for c in own),
        "logprobs": lists if reported else None,
        "finish_reason": own[-1]["finish_reason"],
    }


# Tokens that are halves of characters, next to each other and to whole ones.
TOKENS = st.integers(0, 4095) | st.sampled_from([100, 150, 200, 230, 250])


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompts=st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=2),
    n=st.integers(1, 2),
    max_tokens=st.sampled_from([0, 1, 2, 8]),
    logprobs=st.sampled_from([None, 0, 2]),
    echo=st.booleans(),
    stop=st.sampled_from([None, "e", " t"]),
    seed=st.integers(0, 1000),
)
def test_the_pieces_of_a_stream_are_the_whole_answer(
    served: Running, prompts: Any, echo: bool, logprobs: Any, **options: Any
) -> None:
    body = {"prompt": prompts, "echo": echo, "logprobs": logprobs, "temperature": 2.0, **options}
    whole = served.complete(**body)
    asked = {**body, "stream_options": {"include_usage": True}}
    *events, usage = served.events(PATH, model="tiny", **asked)
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for choice in whole["choices"]:
        assert joined(events, choice["index"]) == choice
        reported = choice["logprobs"]
        if echo and reported:
            number = choice["index"] // options["n"]
            assert len(reported["tokens"]) >= len(prompts[number])
            assert reported["token_logprobs"][0] is None
            assert reported["text_offset"] == sorted(reported["text_offset"])
            assert reported["text_offset"][-1] <= len(choice["text"])


def test_offsets_count_what_is_no_character_as_the_text_does(served: Running) -> None:
    """Bytes that are no UTF-8 are U+FFFD in the text, as is half a character at a prompt's end."""
    encode = served.engine.tokenizer.encode
    snowman = encode("\N{SNOWMAN}", add_special_tokens=False)
    assert len(snowman) == 3
    (a,) = encode("a", add_special_tokens=False)
    prompt = [a, snowman[0], a, snowman[1], snowman[1], a, *snowman, a, *snowman[:2]]
    forced = {str(a): 100}
    choice = served.complete(prompt, echo=True, logprobs=0, logit_bias=forced, max_tokens=2)
    (choice,) = choice["choices"]
    assert choice["text"] == "a\ufffda\ufffd\ufffda\N{SNOWMAN}a\ufffdaa"
    offsets = [0, 1, 1, 3, 4, 5, 6, 6, 6, 7, 8, 8, 9, 10]
    assert choice["logprobs"]["text_offset"] == offsets


def test_the_first_event_of_each_choice_has_the_prompt(served: Running) -> None:
    prompts = ["The with statement", "A"]
    body: Any = {"echo": True, "logprobs": 1, "n": 2, "temperature": 1, "seed": 1, "max_tokens": 3}
    events = served.events(PATH, model="tiny", prompt=prompts, **body)
    for index in range(4):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        ids = served.engine.encode(prompts[index // 2])
        assert own[0]["text"].startswith(prompts[index // 2])
        assert len(own[0]["logprobs"]["tokens"]) == len(ids) + 1
        assert own[0]["logprobs"]["token_logprobs"][0] is None
        assert [len(c["logprobs"]["tokens"]) for c in own[1:]] == [1, 1]


def test_without_new_tokens_a_prompt_is_scored_alone(served: Running) -> None:
    ids = served.engine.encode("The with statement")
    one = served.complete(ids, echo=True, logprobs=2, temperature=0, max_tokens=1)["choices"][0]
    for n in (1, 2):
        done = served.complete(ids, echo=True, logprobs=2, temperature=0, max_tokens=0, n=n)
        assert [c["index"] for c in done["choices"]] == list(range(n))
        for choice in done["choices"]:
            assert (choice["text"], choice["finish_reason"]) == ("The with statement", "length")
            for part, values in choice["logprobs"].items():
                assert values == one["logprobs"][part][:-1]
        assert done["usage"]["completion_tokens"] == 0
        assert done["usage"]["total_tokens"] == len(ids)
        assert done["routing"]["mean_experts"] > 0
    nothing = served.complete(ids, max_tokens=0)["choices"][0]
    assert (nothing["text"], nothing["logprobs"]) == ("", None)
    (event,) = served.events(PATH, model="tiny", prompt=ids, max_tokens=0)
    assert event["choices"] == [nothing]
    assert event["routing"]["name"] == "full"
    served.idle()


def test_a_context_may_be_full_where_nothing_is_added(served: Running) -> None:
    limit = served.engine.config.max_positions
    ids = [7 + i % 50 for i in range(limit)]
    choice = served.complete(ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == limit
    assert served.refused(400, prompt=ids, max_tokens=1)["code"] == "context_length_exceeded"
    assert served.refused(400, prompt=[*ids, 7], max_tokens=0)["code"] == "context_length_exceeded"
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}
    assert served.refused(400, "/v1/chat/completions", **chat)["param"] == "max_tokens"


def test_what_a_completion_may_not_be(served: Running) -> None:
    assert served.refused(400, prompt=...)["message"] == "prompt is missing."
    assert served.refused(400, prompt=[])["param"] == "prompt"
    assert "4096" in served.refused(400, prompt=[5000])["message"]
    assert "at most 1024" in served.refused(400, prompt=["a"] * 1025)["message"]
    assert "at most 16" in served.refused(400, stop=["a"] * 17)["message"]
    assert "token ids" in served.refused(400, logit_bias={"x": 1})["message"]
    assert (
        "json_schema is missing"
        in served.refused(400, response_format={"type": "json_schema"})["message"]
    )
    assert served.refused(400, temperature=-1)["param"] == "temperature"
    assert served.refused(400, max_tokens=-1)["param"] == "max_tokens"
    assert served.refused(400, max_tokens="5")["param"] == "max_tokens"
    assert served.refused(400, best_of=2)["message"] == "unknown key 'best_of'."
    served.complete(user="me", metadata={"a": 1}, max_tokens=1)  # of the list that is ignored
