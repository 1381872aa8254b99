"""X-Request-ID: the client's own, else a new one."""

from __future__ import annotations

from tests.server.conftest import Running


def test_every_answer_has_an_id_the_clients_own_if_it_has_one(served: Running) -> None:
    ids = {served.http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    for path in ("/health", "/nothing"):
        answer = served.http.get(path, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
    odd = served.http.get("/health", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] != "a b"
