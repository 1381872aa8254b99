"""A line for every request, without a word of it, and none that a client made up."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from elastic_moe.engine.outputs import Completion, RoutingStats, Usage
from elastic_moe.server.errors import log_failure
from elastic_moe.server.observe import logs
from elastic_moe.server.observe.access_record import AccessRecord
from tests.server.conftest import Running
from tests.server.raw import leave

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
SECRETS = ("sesame", "jabberwock", "opera-key", "vorpal")
EVIL = "/v1/%0a2026-01-01T00:00:00.000Z%20info%20GET%20/%1b[2J%e2%80%a8%ff"


def ask(url: str) -> str:
    """Requests of many kinds, which hold secrets; the longest line that was generated."""
    key = {"authorization": "Bearer opera-key"}
    with httpx2.Client(base_url=url, headers=key, timeout=60) as http:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "ignore_eos": True}
        asked["temperature"] = 0
        done = http.post(
            "/v1/completions?query=sesame",
            json={**asked, "prompt": "jabberwock", "routing_config": {"depth": 3}},
            headers={"x-request-id": 'mine"1', "x-secret": "vorpal"},
        )
        chat = {**asked, "messages": [{"role": "user", "content": "jabberwock"}], "stream": True}
        http.post("/v1/chat/completions", json=chat)
        http.post("/v1/completions", json={**asked, "prompt": "jabberwock", "nonsense": "vorpal"})
        http.get(EVIL)
        http.get("/v1/models", headers={"authorization": "Bearer sesame"})
        http.get("/health")
    line = max(done.json()["choices"][0]["text"].splitlines(), key=len)
    assert len(line) > 8  # a word might be one of the log's own
    return line


def serve(folder: Path, *options: str) -> tuple[str, list[str]]:
    """What a server writes first, and then while it is asked, until it is stopped."""
    command = [sys.executable, "-m", "elastic_moe.cli", "serve", str(folder)]
    command += ["--port", "0", "--seed", "0"]
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, encoding="utf-8", errors="strict"
    ) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            url = re.search(r"http://[\d.:]+", first)
            assert url is not None, first + process.stderr.read()
            answer = ask(url[0])
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
        finally:
            process.kill()
    for secret in (*SECRETS, answer):
        assert secret not in rest
    *lines, end = rest.split("\n")
    assert end == ""
    return first, lines


def test_a_line_of_json_for_every_request(tiny_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("opera-key")
    first, lines = serve(tiny_folder, "--log-format", "json", "--api-keys", str(keys))
    begin = json.loads(first)
    assert set(begin) == {"time", "level", "event", "message"}
    assert begin["message"].startswith("tiny on http://")
    reported = [json.loads(line) for line in lines]
    for one in reported:
        assert re.fullmatch(TIME, one["time"])
        assert one["event"] == "request"
        assert one["level"] == "info"  # none for /health, which is debug
        assert list(one)[3:] == [
            "method",
            "path",
            "status",
            "outcome",
            "duration_ms",
            "subnet",
            "prompt_tokens",
            "completion_tokens",
            "ttft_ms",
            "request_id",
        ]
    # A stream's line may come after the next request's: its last event leaves before it.
    chat = next(one for one in reported if one["path"] == "/v1/chat/completions")
    text, wrong, evil, stranger = (one for one in reported if one is not chat)
    assert (text["method"], text["path"], text["status"]) == ("POST", "/v1/completions", 200)
    assert (text["outcome"], text["subnet"], text["request_id"]) == ("complete", "L3", 'mine"1')
    assert text["completion_tokens"] == 8
    assert text["prompt_tokens"] > 0
    assert 0 < text["ttft_ms"] < text["duration_ms"]
    assert (chat["status"], chat["outcome"], chat["subnet"]) == (200, "complete", "full")
    assert 1 <= chat["completion_tokens"] <= 8
    assert (wrong["status"], wrong["outcome"]) == (400, "error")
    assert (wrong["subnet"], wrong["prompt_tokens"], wrong["ttft_ms"]) == (None, None, None)
    assert (evil["status"], stranger["status"]) == (404, 401)
    assert evil["path"].isascii()


def test_a_readable_line_for_every_request(tiny_folder: Path) -> None:
    first, lines = serve(tiny_folder, "--log-level", "debug")
    assert re.fullmatch(r"tiny on http://127\.0\.0\.1:\d+/v1\n", first)
    assert len(lines) == 6
    for line in lines:
        assert re.fullmatch(rf"{TIME} (info|debug) [A-Z]+ /\S+ \d+ [a-z]+ [\d.]+ms .*", line)
    number, words = r"\d+", r"[\d.]+"
    assert re.fullmatch(
        rf"{TIME} info POST /v1/completions 200 complete {words}ms subnet=L3 "
        rf'prompt_tokens={number} completion_tokens=8 ttft_ms={words} request_id=mine"1',
        lines[0],
    )
    evil = "/v1/%0A2026-01-01T00%3A00%3A00.000Z%20info%20GET%20/%1B%5B2J%E2%80%A8%EF%BF%BD"
    assert sum(f" info GET {evil} 404 error " in line for line in lines) == 1
    assert " debug GET /health 200 complete " in lines[-1]


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Afterwards."""
    loggers = [logging.getLogger(), logging.getLogger("elastic_moe")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def ended(**fields: Any) -> AccessRecord:
    """The record of a request that has ended."""
    record = AccessRecord(**fields)
    record.end()
    return record


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize("kind", ["text", "json"])
@pytest.mark.parametrize("level", logs.LEVELS)
def test_a_level_is_the_least_that_is_written(
    kind: logs.LogFormat, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # a second time changes what the first one did
        logs.configure(kind, level)
    assert logs.startup_line(kind, "tiny on x").endswith(("tiny on x", 'tiny on x"}'))
    for record in (
        ended(status=200, response_complete=True, endpoint="/health", path="/debug"),
        ended(status=200, response_complete=True, path="/info"),
        ended(status=504, response_complete=True, path="/warning"),
    ):
        logs.log_request(record)
    log_failure(ZeroDivisionError("jabberwock"))
    others = logging.getLogger("uvicorn.error")
    others.info("not ours: /never")
    others.warning("not ours: /warning")
    others.error("not ours: /error")
    lines = capsys.readouterr().err.splitlines()
    expected = logs.LEVELS[logs.LEVELS.index(level) :]
    assert ["ZeroDivisionError" in line for line in lines].count(True) == 1
    for name, times in (("debug", 1), ("info", 1), ("warning", 2), ("error", 1), ("never", 0)):
        there = sum(f"/{name}" in line for line in lines)
        assert there == (times if name in expected else 0), (name, lines)


def told_of(record: AccessRecord, caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "elastic_moe"):
        logs.log_request(record)
    return caplog.records


@pytest.mark.parametrize(
    ("ended_request", "level", "outcome"),
    [
        (ended(status=200, response_complete=True), logging.INFO, "complete"),
        (ended(status=200), logging.INFO, "truncated"),
        (ended(status=404, response_complete=True), logging.INFO, "error"),
        (ended(status=429, response_complete=True), logging.INFO, "error"),
        (ended(status=500, response_complete=True), logging.WARNING, "error"),
        (ended(status=200, response_complete=True, failed=True), logging.WARNING, "error"),
        (
            ended(status=504, response_complete=True, timed_out="request"),
            logging.WARNING,
            "timeout",
        ),
        (
            ended(status=200, response_complete=True, failed=True, timed_out="request"),
            logging.WARNING,
            "timeout",
        ),
        (ended(status=408, response_complete=True, timed_out="read"), logging.INFO, "timeout"),
        (ended(status=499, response_complete=True, disconnected=True), logging.INFO, "gone"),
        (ended(disconnected=True), logging.INFO, "gone"),
        # Fault injection cut these, or closed their connection.
        (ended(status=200, response_complete=True, damaged=True), logging.INFO, "truncated"),
        (ended(status=200, disconnected=True, damaged=True), logging.INFO, "truncated"),
        (ended(status=400, response_complete=True, damaged=True), logging.INFO, "error"),
        (ended(status=200, response_complete=True, endpoint="/health"), logging.DEBUG, "complete"),
        (ended(status=200, response_complete=True, endpoint="/metrics"), logging.DEBUG, "complete"),
        (ended(status=503, response_complete=True, endpoint="/ready"), logging.WARNING, "error"),
    ],
)
def test_what_needs_a_look_is_told_at_a_higher_level(
    ended_request: AccessRecord, level: int, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    (record,) = told_of(ended_request, caplog)
    assert record.levelno == level
    assert logs.request_fields(ended_request)["outcome"] == outcome
    assert f" {outcome} " in record.getMessage()


def records(caplog: pytest.LogCaptureFixture, count: int) -> list[logging.LogRecord]:
    """So many of ours, which come when the client has read all already."""
    until = time.monotonic() + 20
    while len(ours := [r for r in caplog.records if r.name.startswith("elastic_moe")]) < count:
        assert time.monotonic() < until
        time.sleep(0.005)
    return ours


def test_the_client_that_went_and_the_stream_that_ended_are_told_apart(
    served: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "elastic_moe"):
        leave(served, stream=True)
        records(caplog, 1)
        served.post("/v1/completions", model="tiny", prompt="The", stream=True)
        gone, complete = (record.getMessage() for record in records(caplog, 2))
    assert gone.startswith("POST /v1/completions 200 gone ")
    assert "subnet=full" in gone
    assert "tokens=" not in gone  # unknown values are left out
    assert complete.startswith("POST /v1/completions 200 complete ")


def test_several_prompts_are_one_line() -> None:
    def done(ttft: float, read: int, written: int) -> Completion:
        usage = Usage(read, written, ttft, 0.0)
        return Completion("", (1,), None, "stop", usage, RoutingStats("", "", 1, 1, 1.0, 1.0))

    fields = logs.request_fields(ended(completions=[done(0.5, 3, 1), done(0.25, 4, 2)]))
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (7, 3)
    assert fields["ttft_ms"] == 250.0


def test_a_path_as_long_as_a_book_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    (record,) = told_of(ended(method="GET", path="/" + "x" * 60_000), caplog)
    assert len(record.getMessage()) < 400
    assert "x..." in record.getMessage()


def written(record: logging.LogRecord) -> tuple[str, str]:
    """A record as text, and the message of its JSON."""
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    return logs.TextFormatter().format(record), json.loads(line)["message"]


def record(message: str, name: str = "elastic_moe.server", error: Any = None) -> logging.LogRecord:
    reported = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(name, logging.ERROR, "", 0, message, None, reported)


def test_no_message_begins_a_line_or_moves_the_cursor() -> None:
    evil = "one\r\x1b[2J\ttwo\x85\u2028three\n2026-01-01T00:00:00.000Z info GET / 200"
    text, reported = written(record(evil))
    assert reported == evil
    assert text.count("\n") == 1
    first, second = text.split("\n")
    assert first.endswith(r" error one\r\x1b[2J\ttwo\x85\u2028three")
    assert second == "    2026-01-01T00:00:00.000Z info GET / 200"


def test_a_fault_is_told_by_its_place_and_not_in_its_own_words() -> None:
    try:
        raise ValueError("the prompt was: jabberwock")
    except ValueError as error:
        fault = error
    for name in ("uvicorn.error", "elastic_moe.server"):
        text, reported = written(record("Exception in ASGI application\n", name, fault))
        for way in (text, reported):
            assert "Exception in ASGI application" in way
            assert "ValueError" in way
            assert "in test_a_fault_is_told_by_its_place" in way
            assert "jabberwock" not in way.replace('"the prompt was: jabberwock"', "")
    text, reported = written(record("Task exception\nfuture: ValueError('jabberwock')", "asyncio"))
    assert text.endswith(" error Task exception")
    assert reported == "Task exception"


def test_a_fault_of_the_server_comes_in_the_same_format(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(_: Any) -> Any:
        raise ZeroDivisionError("jabberwock")

    with monkeypatch.context() as patch:
        patch.setattr(type(served.server.app.state.service), "fingerprint", property(faulty))
        served.refused(500, max_tokens=1)
    fault, asked = records(caplog, 2)
    reported = json.loads(logs.JsonFormatter().format(fault))
    assert set(reported) == {"time", "level", "event", "message"}
    assert (reported["level"], reported["event"]) == ("error", "message")
    assert reported["message"].startswith("ZeroDivisionError\n")
    assert json.loads(logs.JsonFormatter().format(asked))["status"] == 500
