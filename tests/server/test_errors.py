"""Errors in the form of the API: invalid bodies, unknown paths and methods, internal errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Running


@pytest.mark.parametrize(
    ("content", "reported"),
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
    served: Running, content: bytes, reported: str
) -> None:
    kind = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = served.http.post(path, content=content, headers=kind)
        status = 404 if reported == "does not exist" and "chat" not in path else 400
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        if "chat" not in path:
            assert reported in error["message"]


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
