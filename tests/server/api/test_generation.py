"""What every generating endpoint does, whatever its body and answer."""

from __future__ import annotations

import json
import socket
from typing import Any, NamedTuple

import pytest

from elastic_moe.protocol import ChatChunk, ChatCompletion, TextCompletion
from elastic_moe.protocol.base import Answer
from tests.server.conftest import Running
from tests.server.observe.scraping import Scraped, scraped_when

ADMIN = {"authorization": "Bearer admin-key"}


class Endpoint(NamedTuple):
    """How to ask an endpoint for text.

    Attributes:
        body: what it needs beside a model.
        answer, chunk: of a whole answer, and of an event of a stream.
    """

    body: dict[str, Any]
    answer: type[Answer]
    chunk: type[Answer]


# Every generating endpoint stands here; the tests below ask all of them.
ENDPOINTS = {
    "/v1/chat/completions": Endpoint(
        {"messages": [{"role": "user", "content": "The"}]}, ChatCompletion, ChatChunk
    ),
    "/v1/completions": Endpoint({"prompt": "The"}, TextCompletion, TextCompletion),
}
each_endpoint = pytest.mark.parametrize("path", ENDPOINTS)


@pytest.fixture(scope="module")
def recording(start: Any) -> Running:
    """A server that keeps its requests."""
    running: Running = start({"inject": "on", "admin_keys": ("admin-key",)})
    return running


def test_every_generating_endpoint_is_asked(served: Running) -> None:
    streaming = {
        name.removeprefix("POST ")
        for name, operation in served.operations().items()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    }
    assert streaming == set(ENDPOINTS), "see ENDPOINTS in tests/server/api/test_generation.py"


@each_endpoint
def test_answers_and_events_are_as_described(served: Running, path: str) -> None:
    endpoint = ENDPOINTS[path]
    body = {"model": "tiny@L3-k2", **endpoint.body, "max_tokens": 5, "n": 2, "seed": 3}
    answer = served.post(path, **body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-elastic-subnet"] == "L3-k2"
    assert "x-ratelimit-remaining-requests" in answer.headers
    whole = answer.json()
    endpoint.answer.model_validate(whole, strict=True)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    *events, last = served.events(path, **body, stream_options={"include_usage": True})
    for event in (*events, last):
        endpoint.chunk.model_validate(event, strict=True)
    assert last["choices"] == []
    same = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][key] for key in same] == [whole["usage"][key] for key in same]
    assert [e["routing"] for e in events if "routing" in e] == [whole["routing"]]
    assert whole["routing"]["name"] == "L3-k2"


def text_of(choice: dict[str, Any]) -> str:
    """Of a choice of an event."""
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


@each_endpoint
def test_a_token_that_ends_no_character_writes_no_event(served: Running, path: str) -> None:
    body = {"model": "tiny", **ENDPOINTS[path].body, "max_tokens": 200, "n": 4, "seed": 3}
    events = served.events(path, **body, ignore_eos=True)
    choices = [choice for event in events for choice in event["choices"]]
    assert len(choices) < 800, "every token of this text ends a character: choose another seed"
    for index in range(4):
        _, *later = [choice for choice in choices if choice["index"] == index]
        assert all(text_of(choice) or choice["finish_reason"] for choice in later)


@each_endpoint
def test_prompt_and_max_tokens_choose_the_step_of_a_profile(served: Running, path: str) -> None:
    """The profile `batch` has fewer experts per token above 256 tokens."""
    body = {"model": "tiny", **ENDPOINTS[path].body, "profile": "batch", "temperature": 0}
    first = served.post(path, **body, max_tokens=1).json()
    below = 256 - first["usage"]["prompt_tokens"]
    for stream in (False, True):
        top_ks = []
        for max_tokens in (below, below + 1):
            asked = {**body, "max_tokens": max_tokens}
            reported = (
                served.events(path, **asked)[-1] if stream else served.post(path, **asked).json()
            )
            top_ks.append(reported["routing"]["top_k"])
        assert top_ks[0] == first["routing"]["top_k"] > top_ks[1]


@each_endpoint
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_counted_and_its_text_kept(
    recording: Running, path: str, stream: bool
) -> None:
    body = {"model": "tiny", **ENDPOINTS[path].body, "max_tokens": 5, "ignore_eos": True}
    name = "vllm:request_generation_tokens_sum"
    before = Scraped(recording)(name)
    assert recording.post(path, **body, stream=stream, temperature=0).status_code == 200
    scraped_when(recording, lambda now: now(name) == before + 5)
    kept = recording.http.get("/admin/requests", headers=ADMIN).json()["requests"]
    (text,) = {record["text"] for record in kept if record["path"] == path}
    assert text, "see _first_choice_text in elastic_moe/server/observe/request_history.py"


@each_endpoint
@pytest.mark.parametrize("text", [r"\ud800", r"\udfff\ud800"])
def test_records_can_be_read_after_a_text_that_utf8_cannot_say(
    recording: Running, path: str, text: str
) -> None:
    content = '{"model": "tiny", "user": "' + text + '"}'
    headers = {"content-type": "application/json"}
    assert recording.http.post(path, content=content, headers=headers).status_code == 400
    kept = recording.http.get("/admin/requests", headers=ADMIN)
    assert kept.status_code == 200
    assert kept.json()["requests"][-1]["body"] is None


def test_a_client_that_goes_ends_its_request(served: Running) -> None:
    """Whether it streams or waits for the whole."""
    for stream in (True, False):
        body = json.dumps(
            {
                "model": "tiny",
                "prompt": "The",
                "max_tokens": 600,
                "ignore_eos": True,
                "stream": stream,
            }
        ).encode()
        host, port = served.url.removeprefix("http://").split(":")
        before = served.engine.stats().steps
        with socket.create_connection((host, int(port))) as client:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            client.sendall(head.encode() + body)
            while served.engine.stats().steps < before + 20:
                pass
        served.idle()
        assert served.engine.stats().steps < before + 500
