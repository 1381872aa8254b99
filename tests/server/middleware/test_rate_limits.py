"""x-ratelimit-* headers and Retry-After tell how full the engine is."""

from __future__ import annotations

import time
from typing import Any

import pytest

from elastic_moe import Engine, SamplingParams
from elastic_moe.engine.outputs import Completion, RoutingStats, Usage
from elastic_moe.server.middleware.rate_limits import rate_limit_headers, retry_after_seconds
from elastic_moe.server.observe.access_record import AccessRecord
from elastic_moe.server.observe.metrics import Metrics
from tests.server.conftest import Running, slow

LIMIT, REMAINING, RESET = (
    f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")
)
LONG = SamplingParams(max_tokens=600, ignore_eos=True)  # 12 seconds of slow steps


@pytest.fixture(scope="module")
def narrow(start: Any) -> Running:
    running: Running = start({"api_keys": ("key",)}, max_queue=3)
    slow(running.engine)
    return running


def limits_of(answer: Any) -> dict[str, str]:
    return {name: text for name, text in answer.headers.items() if "ratelimit" in name}


def test_an_answer_tells_how_many_more_requests_are_taken(narrow: Running) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for path, body in (
        ("/v1/completions", {"model": "tiny", "prompt": "The", "max_tokens": 1}),
        ("/v1/chat/completions", chat),
    ):
        reported = limits_of(narrow.post(path, **body))
        assert reported == {LIMIT: "3", REMAINING: "3", RESET: "0s"}
    held = [narrow.engine.stream([5], None, LONG) for _ in range(2)]
    whole = narrow.post("/v1/completions", model="tiny", prompt="The", max_tokens=1)
    assert limits_of(whole)[REMAINING] == "1"
    body = {"model": "tiny", "prompt": "The", "ignore_eos": True, "stream": True}
    with narrow.http.stream("POST", "/v1/completions", json=body) as streamed:
        assert limits_of(streamed)[REMAINING] == "0"  # it is one of them
        assert float(limits_of(streamed)[RESET].removesuffix("s")) > 0
        refused = narrow.post("/v1/completions", model="tiny", prompt="The")
        if refused.status_code == 429:  # unless the stream has ended
            assert limits_of(refused)[REMAINING] == "0"
    for own in held:
        own.close()  # type: ignore[attr-defined]
    narrow.idle()


def test_a_refusal_for_want_of_room_tells_that_there_is_none(narrow: Running) -> None:
    held = [narrow.engine.stream([5], None, LONG) for _ in range(3)]
    refused = narrow.post("/v1/completions", model="tiny", prompt="The", max_tokens=1)
    assert refused.status_code == 429
    assert limits_of(refused)[REMAINING] == "0"
    until = time.monotonic() + 20
    while narrow.engine.stats().running < 3:
        assert time.monotonic() < until
    narrow.server.app.state.service.metrics.run_seconds = 10.0
    refused = narrow.post("/v1/completions", model="tiny", prompt="The", stream=True)
    assert refused.headers["retry-after"] == "4"  # of three that run, one ends by then
    for own in held:
        own.close()  # type: ignore[attr-defined]
    narrow.idle()


def test_who_has_no_key_or_asks_what_is_not_limited_is_told_nothing(narrow: Running) -> None:
    stranger = {"authorization": "Bearer other"}
    answer = narrow.http.post("/v1/completions", json={}, headers=stranger)
    assert answer.status_code == 401
    assert limits_of(answer) == {}
    assert limits_of(narrow.http.get("/v1/models")) == {}
    embedded = narrow.post("/v1/embeddings", model="tiny", input="The")  # waits in no queue
    assert embedded.status_code == 200
    assert limits_of(embedded) == {}


def ran(seconds: float, queued: float = 0.0) -> Completion:
    """A generation that ran so long."""
    usage = Usage(1, 2, queued + seconds / 2, seconds / 2, 0, queued)
    routing = RoutingStats("full", "", 1, 1, 1.0, 1.0)
    return Completion("ab", (1, 2), None, "length", usage, routing)


def test_times_are_estimated_from_those_of_late(tiny_folder: Any) -> None:
    metrics = Metrics()
    with Engine.from_pretrained(tiny_folder, max_num_seqs=2, max_queue=9) as engine:
        slow(engine)
        held = [engine.stream([5], None, LONG) for _ in range(6)]
        until = time.monotonic() + 20
        while engine.stats().running < 2:
            assert time.monotonic() < until
        assert RESET not in rate_limit_headers(engine, metrics)  # nothing is known yet
        assert retry_after_seconds(engine, metrics) == 1
        for _ in range(3):
            metrics.observe(AccessRecord(status=200, completions=[ran(10.0, queued=99.0)]))
        assert metrics.run_seconds == pytest.approx(10.0)
        # Two run at once: the next place is free in 5 seconds, and 6 requests take three rounds.
        assert retry_after_seconds(engine, metrics) == 5
        assert rate_limit_headers(engine, metrics)[RESET] == "30s"
        metrics.observe(AccessRecord(status=200, completions=[ran(20.0)]))
        assert metrics.run_seconds == pytest.approx(11.0)  # follows slowly
        for own in held:
            own.close()  # type: ignore[attr-defined]
        while engine.stats().unfinished:
            assert time.monotonic() < until
        assert rate_limit_headers(engine, metrics) == {LIMIT: "9", REMAINING: "9", RESET: "0s"}
    assert rate_limit_headers(engine, metrics) == {}  # closed: no limit to tell of


def test_more_requests_than_the_queue_takes_are_told_to_come_again(guarded: Running) -> None:
    core = guarded.engine._running_core()
    streams = [guarded.engine.stream([5], None, SamplingParams(max_tokens=500)) for _ in range(2)]
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "The", "stream": stream}
        answer = guarded.post("/v1/completions", **body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "queue_full"
    for own in streams:
        own.close()  # type: ignore[attr-defined]
    core.call(lambda: None)
    guarded.complete(max_tokens=1)
