"""Faults on purpose: what was asked for happens, to whom it was asked for, and is recorded."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from elastic_moe.protocol.admin.faults import FaultPlan
from elastic_moe.server.middleware.fault_selection import FaultSelector
from tests.logprobs import log_softmax
from tests.server.conftest import Running
from tests.server.raw import leave

ADMIN = {"authorization": "Bearer admin-key"}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def module(start: Any) -> Running:
    return start({"inject": "on", "admin_keys": ("admin-key",)})


@pytest.fixture
def running(module: Running) -> Iterator[Running]:
    yield module
    module.http.delete("/admin/faults", headers=ADMIN)
    module.idle()


def ask(running: Running, headers: dict[str, str] | None = None, **body: Any) -> httpx2.Response:
    asked = {"model": "tiny", "prompt": [5, 6], "max_tokens": 6, "temperature": 0, **body}
    return running.http.post(PATH, json=asked, headers=headers or {})


def plan(running: Running, *rules: dict[str, Any], **rest: Any) -> dict[str, Any]:
    answer = running.http.put("/admin/faults", json={"rules": list(rules), **rest}, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


def last(running: Running) -> dict[str, Any]:
    """The record of the last request, once it has ended."""
    until = time.monotonic() + 10
    while True:
        reported = running.http.get("/admin/requests", headers=ADMIN).json()["requests"][-1]
        if reported["outcome"] != "running":
            return reported
        assert time.monotonic() < until
        time.sleep(0.01)


def events(running: Running, headers: dict[str, str], **body: Any) -> list[str]:
    """Data of the events that come before the stream ends or breaks; 'cut' last if it broke."""
    asked = {"model": "tiny", "prompt": [5, 6], "max_tokens": 6, "temperature": 0, "stream": True}
    found = []
    with running.http.stream("POST", PATH, json={**asked, **body}, headers=headers) as answer:
        try:
            found.extend(line.removeprefix("data: ") for line in answer.iter_lines() if line)
        except httpx2.RemoteProtocolError:
            found.append("cut")
    return found


def test_an_error_comes_in_place_of_an_answer(running: Running) -> None:
    for status in (400, 401, 429, 500, 503, 599):
        for stream in (False, True):
            reported = {"x-inject-error": str(status), "x-inject-retry-after": "2"}
            answer = ask(running, reported, stream=stream)
            assert answer.status_code == status
            assert answer.headers["retry-after"] == "2"
            assert answer.headers["x-request-id"]
            assert answer.json()["error"]["code"] == "injected"
            record = last(running)
            assert (record["status"], record["outcome"]) == (status, "error")
            assert record["injected"] == {"error": status, "retry_after": 2.0}
            assert record["stream"] == stream
    assert ask(running).status_code == 200
    assert last(running)["injected"] is None


def test_times_pass_where_they_were_asked_for(running: Running) -> None:
    begun = time.monotonic()
    plain = ask(running)
    usual = time.monotonic() - begun
    for header in ("x-inject-latency-ms", "x-inject-ttft-ms"):
        begun = time.monotonic()
        assert ask(running, {header: "300"}).json()["choices"] == plain.json()["choices"]
        assert 0.3 <= time.monotonic() - begun < 2.3 + 2 * usual
    # Whenever the client gets to read them, no event is there before its time.
    times: list[float] = []
    asked = {"model": "tiny", "prompt": [5, 6], "max_tokens": 6, "temperature": 0, "stream": True}
    headers = {"x-inject-itl-ms": "60-80", "x-inject-ttft-ms": "200"}
    begun = time.monotonic()
    with running.http.stream("POST", PATH, json=asked, headers=headers) as answer:
        times.extend(time.monotonic() - begun for line in answer.iter_lines() if line)
    assert len(times) >= 5
    assert all(at >= 0.2 + 0.06 * i for i, at in enumerate(times))
    assert times[-1] < 0.2 + 0.08 * len(times) + 2 + 2 * usual


def test_a_stream_breaks_off_after_so_many_events(running: Running) -> None:
    whole = events(running, {})
    assert whole[-1] == "[DONE]"
    for n in (1, 3, len(whole) - 1):
        assert len(events(running, {"x-inject-drop-after": str(n)})) == n + 1
        assert events(running, {"x-inject-drop-after": str(n)})[-1] == "cut"
        record = last(running)
        assert record["outcome"] == "truncated"
        assert record["injected"] == {"drop_after": n}
    assert events(running, {"x-inject-drop-after": "99"})[-1] == "[DONE]"
    assert last(running)["outcome"] == "complete"


def test_a_connection_closes_before_or_in_the_midst_of_an_answer(running: Running) -> None:
    for stream in (False, True):
        with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
            ask(running, {"x-inject-drop-after": "0"}, stream=stream)
        record = last(running)
        assert record["outcome"] == "truncated"
        assert record["text"] is None
    with pytest.raises(httpx2.RemoteProtocolError, match="complete message body"):
        ask(running, {"x-inject-drop-after": "1"})
    running.idle()


def test_an_event_is_spoilt_and_the_stream_goes_on(running: Running) -> None:
    found = events(running, {"x-inject-malformed-after": "2"})
    assert found[-1] == "[DONE]"
    bad = []
    for i, data in enumerate(found[:-1]):
        try:
            json.loads(data)
        except ValueError:
            bad.append(i)
    assert bad == [2]
    assert last(running)["outcome"] == "truncated"
    answer = ask(running, {"x-inject-malformed-after": "0"})
    assert answer.status_code == 200
    with pytest.raises(ValueError, match=r"."):
        answer.json()


@pytest.mark.parametrize("stream", [False, True])
def test_a_stalled_answer_ends_with_its_client(running: Running, stream: bool) -> None:
    asked = {"model": "tiny", "prompt": "The", "max_tokens": 5, "ignore_eos": True}
    with pytest.raises(httpx2.ReadTimeout):
        running.http.post(
            PATH,
            json={**asked, "stream": stream},
            headers={"x-inject-stall-after": "2"},
            timeout=0.4,
        )
    assert last(running)["outcome"] == "truncated"
    running.idle()


def test_a_forced_text_comes_token_by_token_with_the_models_own_numbers(running: Running) -> None:
    text = "Ünïcode answer: {broken"
    headers = {"x-force-text": quote(text)}
    done = ask(running, headers, max_tokens=60, logprobs=0).json()
    choice = done["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    engine = running.engine
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    rows = log_softmax(engine.score([5, 6, *ids]))
    reported = choice["logprobs"]["token_logprobs"]
    assert reported == pytest.approx([float(rows[i + 1, t]) for i, t in enumerate(ids)], abs=1e-6)
    assert last(running)["text"] == text
    cut = ask(running, headers, max_tokens=2).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    plan(running, {"force_text": text})
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_object"},  # what breaks it can be tested, too
        "stream": True,
    }
    running.post("/v1/chat/completions", **chat)
    assert last(running)["text"] == text


def test_jittered_routing_is_below_what_was_asked_and_told(running: Running) -> None:
    plan(running, {"routing_jitter": 0.9}, seed=3)
    names = []
    for _ in range(12):
        done = ask(running, logprobs=0).json()
        routing = done["routing"]
        names.append(routing["name"])
        assert set(routing.get("limited", {})) <= {"depth", "top_k"}
        same = running.complete(
            [5, 6], model=f"tiny@{routing['name']}", max_tokens=6, temperature=0, logprobs=0
        )
        if same["routing"]["name"] == routing["name"]:
            assert same["choices"] == done["choices"]
    assert len(set(names)) > 3
    assert any(re.search(r"(^|-)k\d", name) for name in names)  # depth is not all
    plan(running, {"routing_jitter": 0.9}, seed=3)
    again = []
    for _ in range(12):
        again.append(ask(running).json()["routing"]["name"])
        ask(running)  # where the one that compared was
    assert again == names


def test_headers_that_ask_for_nothing_known_are_refused(running: Running) -> None:
    wrong = {
        "x-inject-error": ["200", "x", "600", "4.5"],
        "x-inject-eror": ["429"],
        "x-inject-ttft-ms": ["-1", "nan", "5-3", "1-2-3", "fast"],
        "x-inject-drop-after": ["-1", "1.5"],
        "x-inject-routing-jitter": ["2", "0"],
        "x-inject-retry-after": ["3"],
        "x-force-text": [""],
        "x-inject-force-text": ["a"],
    }
    for header, values in wrong.items():
        for value in values:
            answer = ask(running, {header: value})
            assert answer.status_code == 400, (header, value)
            assert header.rpartition("inject")[2].split("-")[1] in answer.text, answer.text
    both = {"x-inject-error": "429", "x-inject-drop-after": "1"}
    assert ask(running, both).status_code == 400


def test_without_inject_faults_are_refused(start: Any, running: Running) -> None:
    plain = start({"admin_keys": ("admin-key",)})
    for header in ("x-inject-error", "x-force-text", "x-inject-unknown"):
        answer = ask(plain, {header: "429"})
        assert answer.status_code == 400
        assert "--inject" in answer.json()["error"]["message"]
    for path in ("/admin/faults", "/admin/requests"):
        assert plain.http.get(path, headers=ADMIN).status_code == 404
        assert running.http.get(path).status_code == 401
    answer = running.http.get("/health", headers={"x-inject-error": "429"})
    assert answer.status_code == 400


def test_a_rule_strikes_whom_it_says(running: Running) -> None:
    def codes(n: int, **rule: Any) -> list[int]:
        plan(running, {"error": 503, **rule})
        return [ask(running, max_tokens=1).status_code for _ in range(n)]

    assert codes(4) == [503] * 4
    assert codes(4, count=2) == [503, 503, 200, 200]
    assert codes(4, skip=1, count=1) == [200, 503, 200, 200]
    assert codes(5, at=[2, 5]) == [200, 503, 200, 200, 503]
    assert codes(2, path="/v1/chat/completions") == [200, 200]
    assert codes(2, path=PATH) == [503, 503]
    assert codes(2, after_seconds=60) == [200, 200]
    assert codes(2, until_seconds=60) == [503, 503]
    assert codes(2, until_seconds=0) == [200, 200]
    assert codes(2, rate=0) == [200, 200]
    plan(running, {"error": 503, "at": [1]}, {"error": 429})
    assert [ask(running, max_tokens=1).status_code for _ in range(2)] == [503, 429]
    state = running.http.get("/admin/faults", headers=ADMIN).json()
    assert state["counts"] == [{"matched": 2, "injected": 1}, {"matched": 1, "injected": 1}]
    # A request's own headers come in place of the rules.
    assert ask(running, {"x-inject-error": "418"}).status_code == 418


def test_what_is_drawn_follows_from_the_seed() -> None:
    def struck(seed: int, rate: float) -> list[bool]:
        selector = FaultSelector()
        rules = [{"error": 500, "rate": rate}]
        selector.set(FaultPlan.model_validate({"seed": seed, "rules": rules}))
        return [selector.select(PATH, []) is not None for _ in range(400)]

    assert struck(0, 0.3) == struck(0, 0.3) != struck(1, 0.3)
    assert 80 < sum(struck(0, 0.3)) < 160
    assert all(struck(0, 1.0))


def test_the_remote_preset_adds_a_round_trip_to_every_request(start: Any) -> None:
    remote = start({"inject": "remote", "admin_keys": ("admin-key",)})
    for headers in ({}, {"x-inject-error": "429"}):
        begun = time.monotonic()
        ask(remote, headers, max_tokens=1)
        assert 0.2 <= time.monotonic() - begun < 1.5
    assert remote.http.get("/admin/faults", headers=ADMIN).json()["plan"]["preset"] == "remote"
    selector = FaultSelector()
    selector.set(FaultPlan(preset="remote"))
    drawn = [selector.select(PATH, []) for _ in range(50)]
    times = [injection.seconds("latency_ms") for injection in drawn if injection is not None]
    assert len(times) == 50
    assert 0.2 <= min(times) < 0.23
    assert 0.37 < max(times) <= 0.4


def test_a_plan_is_replaced_as_a_whole_or_not_at_all(running: Running) -> None:
    state = plan(running, {"error": 503}, seed=4)
    got = running.http.get("/admin/faults", headers=ADMIN)
    assert got.json() == state
    for bad in (
        {"rules": [{"error": 429}, {"error": 200}]},
        {"rules": [{}]},
        {"rules": [{"error": 429, "eror": 1}]},
        {"rules": [{"error": 429, "drop_after": 1}]},
        {"rules": [{"drop_after": 1, "stall_after": 1}]},
        {"rules": [{"retry_after": 1}]},
        {"rules": [{"ttft_ms": [5, 3]}]},
        {"preset": "lunar"},
    ):
        answer = running.http.put("/admin/faults", json=bad, headers=ADMIN)
        assert answer.status_code == 400, bad
    tag = {"if-match": '"stale"', **ADMIN}
    assert running.http.put("/admin/faults", json={}, headers=tag).status_code == 412
    assert running.http.delete("/admin/faults", headers=tag).status_code == 412
    assert running.http.get("/admin/faults", headers=ADMIN).json() == state
    fresh = {"if-match": got.headers["etag"], **ADMIN}
    assert running.http.put("/admin/faults", json={}, headers=fresh).status_code == 200
    assert ask(running, max_tokens=1).status_code == 200


def test_requests_are_recorded_as_they_came_and_ended(running: Running) -> None:
    first = last(running)["number"] if ask(running, max_tokens=1) else 0
    ask(running, max_tokens=3, prompt="Ä")
    running.http.post(PATH, content=b"{no json")
    running.http.get("/v1/models")
    running.http.get("/health")  # not below /v1/
    with running.http.stream(
        "POST",
        PATH,
        json={"model": "tiny", "prompt": "x", "max_tokens": 600, "stream": True},
        headers={"x-request-id": "mine", "x-inject-itl-ms": "20"},
    ) as answer:
        next(answer.iter_lines())
    assert last(running)["outcome"] == "gone"
    reported = running.http.get(f"/admin/requests?after={first}", headers=ADMIN).json()
    assert reported["dropped"] == 0
    kept = reported["requests"]
    assert [r["number"] for r in kept] == [first + 1, first + 2, first + 3, first + 4]
    outcomes = [(r["method"], r["path"], r["status"], r["outcome"]) for r in kept]
    assert outcomes == [
        ("POST", PATH, 200, "complete"),
        ("POST", PATH, 400, "error"),
        ("GET", "/v1/models", 200, "complete"),
        ("POST", PATH, 200, "gone"),
    ]
    assert kept[0]["body"]["prompt"] == "Ä"
    assert kept[0]["text"]
    assert kept[1]["body"] is None
    assert kept[3]["request_id"] == "mine"
    assert all(r["begun_seconds"] <= r["ended_seconds"] for r in kept)
    assert "authorization" not in json.dumps(kept).lower()
    assert running.http.delete("/admin/requests", headers=ADMIN).status_code == 204
    reported = running.http.get("/admin/requests", headers=ADMIN).json()
    assert reported == {"requests": [], "dropped": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_is_recorded_as_gone(running: Running, stream: bool) -> None:
    leave(running, stream=stream)
    record = last(running)
    assert (record["stream"], record["outcome"]) == (stream, "gone")


def test_an_error_in_mid_stream_is_recorded_as_one(start: Any) -> None:
    running = start({"inject": "on", "admin_keys": ("admin-key",)})
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 600, "stream": True, "ignore_eos": True}
    with running.http.stream("POST", PATH, json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.engine.close()
        assert any("engine_unavailable" in line for line in lines)
    record = last(running)
    assert (record["status"], record["outcome"]) == (200, "error")
    assert record["text"]
