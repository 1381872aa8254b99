"""Bodies that come too slowly, and requests that take too long."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest

from elastic_moe.errors import ServerError
from elastic_moe.server import sse as events
from elastic_moe.server.errors import ApiError
from elastic_moe.server.observe.access_record import ACCESS_RECORD, AccessRecord
from elastic_moe.server.settings import ServerSettings
from tests.server.conftest import Running
from tests.server.observe.scraping import Scraped, scraped_when
from tests.server.raw import LONG, connected, head, read_to_end

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 600,
    "logit_bias": {"20": 100},
}
PATHS = {"/v1/completions": LONG, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def hasty(start: Any) -> Running:
    """A server that gives requests less than a tenth of the time that they need."""
    return start({"request_timeout_seconds": 0.4}, on_step=lambda _: time.sleep(0.01))


def ended(running: Running) -> None:
    """Nothing of a request is left in the engine, which did not go on with it."""
    running.idle()
    assert running.engine.stats().used_blocks == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_request_that_takes_too_long_gets_504(hasty: Running, path: str) -> None:
    steps, late = hasty.engine.stats().steps, Scraped(hasty)
    answer = hasty.post(path, **PATHS[path])
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "timeout")
    assert "0.4 seconds" in error["message"]
    ended(hasty)
    assert hasty.engine.stats().steps < steps + 100
    reported = Scraped(hasty)
    for name, labels in (
        ("elastic_moe:timeouts_total", {"limit": "request"}),
        ("vllm:request_success_total", {"finished_reason": "abort"}),
        ("elastic_moe:http_responses_total", {"endpoint": path, "status": "504"}),
    ):
        assert reported(name, **labels) == late(name, **labels) + 1
    assert reported("elastic_moe:disconnected_clients_total") == 0
    hasty.post(path, **{**PATHS[path], "max_tokens": 1}).raise_for_status()


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_takes_too_long_ends_with_an_error(hasty: Running, path: str) -> None:
    late = Scraped(hasty)
    answer = hasty.post(path, **PATHS[path], stream=True)
    assert answer.status_code == 200
    reported = answer.text.strip().split("\n\n")
    assert len(reported) >= 3
    assert json.loads(reported[0].removeprefix("data: "))["choices"]
    assert json.loads(reported[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert reported[-1] == "data: [DONE]"
    ended(hasty)
    for name, labels in (
        ("elastic_moe:timeouts_total", {"limit": "request"}),
        ("elastic_moe:broken_answers_total", {}),
    ):
        count = late(name, **labels) + 1
        scraped_when(hasty, lambda reported, n=name, ls=labels, c=count: reported(n, **ls) == c)


def test_the_openai_client_knows_it_for_what_may_be_tried_again(hasty: Running) -> None:
    with pytest.raises(openai.InternalServerError) as reported:
        hasty.openai.chat.completions.create(**CHAT)
    assert (reported.value.status_code, reported.value.code) == (504, "timeout")
    ended(hasty)


@pytest.mark.parametrize("reads", [1, 2])
def test_a_client_that_reads_nothing_does_not_keep_its_request_alive(
    reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the stream or its last words are what it does not read."""
    monkeypatch.setattr(events, "ERROR_SEND_SECONDS", 0.05)
    happened: list[str] = []

    async def pieces() -> AsyncGenerator[bytes]:
        try:
            for number in range(2):
                yield str(number).encode()
            await asyncio.sleep(60)
        finally:
            happened.append("ended")

    async def receive() -> Any:
        await asyncio.sleep(0.05)
        raise ApiError(504, "late")

    async def send(message: Any) -> None:
        happened.append(message.get("body", b"head").decode()[:12])
        if len(happened) > 1 + reads:
            await asyncio.sleep(60)

    scope = {"type": "http", ACCESS_RECORD: AccessRecord()}
    stream = events.EventStream(pieces(), {})
    asyncio.run(asyncio.wait_for(stream(scope, receive, send), 10))
    assert happened == ["head", "0", "1", "ended", 'data: {"erro']
    assert scope[ACCESS_RECORD].failed


def test_without_a_limit_a_request_takes_as_long_as_it_needs(served: Running) -> None:
    assert served.server.app.state.service.settings.request_timeout_seconds is None
    done = served.complete(max_tokens=600, ignore_eos=True)
    assert done["usage"]["completion_tokens"] == 600


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_that_does_not_come_in_time_gets_408(start: Any, path: str) -> None:
    patient = start({"read_timeout_seconds": 0.5})
    content = json.dumps({"model": "tiny", "prompt": "The"}).encode()
    begun = time.monotonic()
    with connected(patient) as client:
        client.sendall(head(path, len(content)))
        for byte in content[:6]:  # that something comes now and then does not help
            time.sleep(0.04)
            client.sendall(bytes([byte]))
        answer = read_to_end(client)  # the connection is closed
    assert 0.5 <= time.monotonic() - begun < 5
    status, _, body = answer.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 408 ")
    error = json.loads(body)["error"]
    assert error["code"] == "read_timeout"
    assert "0.5 seconds" in error["message"]
    reported = Scraped(patient)
    assert reported("elastic_moe:timeouts_total", limit="read") == 1
    assert reported("elastic_moe:http_responses_total", endpoint=path, status="408") == 1
    assert reported("elastic_moe:disconnected_clients_total") == 0


def test_a_body_that_came_in_time_leaves_all_time_to_the_answer(start: Any) -> None:
    patient = start({"read_timeout_seconds": 0.05})
    assert patient.complete(max_tokens=600, ignore_eos=True)["usage"]["completion_tokens"] == 600
    stream = patient.post("/v1/completions", **LONG, stream=True)
    assert 'data: {"error"' not in stream.text


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["read_timeout_seconds", "request_timeout_seconds"])
def test_limits_that_are_none_are_refused(name: str, seconds: float) -> None:
    with pytest.raises(ServerError, match=f"{name} must be above 0"):
        ServerSettings(**{name: seconds})
