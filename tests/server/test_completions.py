"""Texts through OpenAI's own client: lists, token ids, echo, log-probabilities."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elastic_moe import SamplingParams
from tests.server.conftest import Running

LENGTH = {"temperature": 0, "max_tokens": 5}


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
        told = [c.logprobs for c in own if c.logprobs]
        for part in ("tokens", "token_logprobs", "text_offset"):
            assert [x for t in told for x in getattr(t, part)] == choice["logprobs"][part]
    names = [c.routing["name"] for c in chunks if getattr(c, "routing", None)]  # type: ignore[attr-defined]
    assert names == ["full", "full"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt(served: Running, stream: bool) -> None:
    prompt = "The \N{SNOWMAN} of"
    plain = served.complete(prompt, **LENGTH)["choices"][0]["text"]
    if not stream:
        assert served.complete(prompt, echo=True, **LENGTH)["choices"][0]["text"] == prompt + plain
        return
    body = {"model": "tiny", "prompt": prompt, "echo": True, "stream": True, **LENGTH}
    *events, _, _ = served.post("/v1/completions", **body).text.split("\n\n")
    pieces = [json.loads(event[6:])["choices"][0]["text"] for event in events]
    assert "".join(pieces) == prompt + plain


def test_log_probabilities_of_a_prompt_are_those_of_scoring(served: Running) -> None:
    """As lm-evaluation-harness reads them."""
    prompt = "The \N{SNOWMAN} of the set"
    ids = served.engine.encode(prompt)
    rows = served.engine.score(ids, "L3-w4").log_softmax(-1)
    choice = served.complete(
        ids, model="tiny@L3-w4", echo=True, logprobs=1, max_tokens=1, temperature=0
    )["choices"][0]
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert len(told["tokens"]) == len(ids) + 1 == len(told["text_offset"])
    for i, token in enumerate(ids[1:], 1):
        assert told["token_logprobs"][i] == pytest.approx(float(rows[i - 1, token]), abs=1e-4)
        (best,) = told["top_logprobs"][i].values()
        assert best == pytest.approx(float(rows[i - 1].max()), abs=1e-4)
    assert told["token_logprobs"][-1] == pytest.approx(float(rows[-1].max()), abs=1e-4)
    for i, offset in enumerate(told["text_offset"]):
        if told["tokens"][i].isascii() and not told["tokens"][i].startswith(("bytes:", "<|")):
            assert choice["text"][offset:].startswith(told["tokens"][i])


def test_what_a_completion_may_not_be(served: Running) -> None:
    assert served.refused(400, prompt=...)["message"] == "prompt is missing."
    assert served.refused(400, prompt=[])["param"] == "prompt"
    assert "4096" in served.refused(400, prompt=[5000])["message"]
    assert "at most 1024" in served.refused(400, prompt=["a"] * 1025)["message"]
    assert "at most 16" in served.refused(400, stop=["a"] * 17)["message"]
    assert "token ids" in served.refused(400, logit_bias={"x": 1})["message"]
    assert (
        "cannot be streamed" in served.refused(400, stream=True, echo=True, logprobs=1)["message"]
    )
    assert (
        "json_schema is missing"
        in served.refused(400, response_format={"type": "json_schema"})["message"]
    )
    assert served.refused(400, temperature=-1)["param"] == "temperature"
    assert served.refused(400, max_tokens=0)["param"] == "max_tokens"
    assert served.refused(400, max_tokens="5")["param"] == "max_tokens"
    assert served.refused(400, best_of=2)["message"] == "unknown key 'best_of'."
    served.complete(user="me", metadata={"a": 1}, max_tokens=1)  # of the list that is ignored
