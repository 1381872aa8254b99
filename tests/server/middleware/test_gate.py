"""Keys, sizes, ids and failures: what every request passes, and what it gets when it does not."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from elastic_moe import Engine, SamplingParams
from elastic_moe.errors import ServerError
from elastic_moe.server.settings import ServerSettings
from tests.server.conftest import Running

KEYS = ("first-key", "ACCESS:SECRET")


@pytest.fixture(scope="module")
def guarded(start: Any) -> Running:
    return start({"api_keys": KEYS, "max_body_bytes": 2000}, max_queue=2)


def test_any_of_the_keys_opens_the_server_and_nothing_else(guarded: Running) -> None:
    for key in KEYS:
        told = {"authorization": f"Bearer {key}"}
        assert guarded.http.get("/v1/models", headers=told).status_code == 200
        assert guarded.http.get(
            "/v1/models", headers={"authorization": f"bearer  {key}"}
        ).is_success
    wrong = ["", "Bearer", "Bearer first", "Bearer first-key2", "Basic first-key", "first-key"]
    for header in wrong:
        for path in ("/v1/models", "/openapi.json", "/tokenizer_info", "/nothing"):
            answer = guarded.http.get(path, headers={"authorization": header})
            assert answer.status_code == 401, (header, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert guarded.http.get(path, headers={"authorization": ""}).status_code == 200


def test_a_body_that_is_too_large_is_refused_with_or_without_a_length(guarded: Running) -> None:
    big = json.dumps({"model": "tiny", "prompt": "x" * 3000}).encode()
    kind = {"content-type": "application/json"}
    for content in (big, iter([big[:1000], big[1000:]])):
        answer = guarded.http.post("/v1/completions", content=content, headers=kind)
        assert answer.status_code == 413
        assert "2000 bytes" in answer.json()["error"]["message"]
    guarded.complete("x" * 300, max_tokens=1)


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


def test_every_answer_has_an_id_the_clients_own_if_it_has_one(served: Running) -> None:
    ids = {served.http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    for path in ("/health", "/nothing"):
        answer = served.http.get(path, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
    odd = served.http.get("/health", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] != "a b"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "body is missing."),
        (b"{", "no JSON"),
        (b"\xff", "pars"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"x"', "body"),
        (b"[" * 100_000, "pars"),
        (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', "body"),
        (b'{"model": "\\ud800", "prompt": "x"}', "does not exist"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "prompt": "x", "seed": 1e999}', "seed"),
    ],
)
def test_malformed_bodies_get_an_error_and_no_traceback(
    served: Running, content: bytes, told: str
) -> None:
    kind = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = served.http.post(path, content=content, headers=kind)
        status = 404 if told == "does not exist" and "chat" not in path else 400
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        if "chat" not in path:
            assert told in error["message"]


def test_paths_and_methods_that_are_not_there(served: Running) -> None:
    assert served.http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    wrong = served.http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "Method Not Allowed"


def test_a_wrong_method_is_told_all_that_a_path_takes(start: Callable[..., Running]) -> None:
    admin = start({"admin_keys": ("adm",)})
    wrong = admin.http.post("/admin/faults", headers={"authorization": "Bearer adm"})
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "DELETE, GET, PUT")


def test_a_fault_of_ours_is_a_500_and_the_next_request_is_served(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "nobody's business"

    def faulty(_: Any) -> Any:
        raise ZeroDivisionError(prompt)

    with monkeypatch.context() as patch:
        patch.setattr(type(served.server.app.state.service), "fingerprint", property(faulty))
        error = served.refused(500, max_tokens=1)
    assert error["type"] == "server_error"
    assert prompt not in error["message"]
    assert "ZeroDivisionError" in caplog.text
    assert "in faulty" in caplog.text
    assert "secret" not in caplog.text.replace(
        'raise ZeroDivisionError("the prompt was: secret")', ""
    )
    served.complete(max_tokens=1)


def test_settings_that_are_refused() -> None:
    with pytest.raises(ServerError, match="can be reached from other machines"):
        ServerSettings(host="0.0.0.0")
    with pytest.raises(ServerError, match="can be reached from other machines"):
        ServerSettings(host="example.org")
    for fine in ({"api_keys": ("k",)}, {"expose_without_keys": True}):
        assert ServerSettings(host="0.0.0.0", **fine).host == "0.0.0.0"
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"):
        assert ServerSettings(host=host).host == host
    with pytest.raises(ServerError, match="API key 2 must be") as told:
        ServerSettings(api_keys=("fine", "not fine"))
    assert "not fine" not in str(told.value)
    with pytest.raises(ServerError, match="without '@'"):
        ServerSettings(aliases=("a@b",))
    with pytest.raises(ServerError, match="port must be"):
        ServerSettings(port=1 << 16)
    for seed in (-(1 << 63) - 1, 1 << 64):
        with pytest.raises(ServerError, match=rf"seed must be in .*, got {seed}\."):
            ServerSettings(seed=seed)
    with pytest.raises(ServerError, match="drain_seconds"):
        ServerSettings(drain_seconds=float("nan"))


def test_a_default_that_the_model_lacks_is_told_at_once(tiny: Engine) -> None:
    from elastic_moe.errors import RoutingError
    from elastic_moe.server.app import create_app

    with pytest.raises(RoutingError, match="got 99"):
        create_app(tiny, ServerSettings(routing="L99"))


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
