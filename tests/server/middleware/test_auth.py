"""API keys: which requests need one, and which one opens what."""

from __future__ import annotations

from tests.server.conftest import Running
from tests.server.middleware.conftest import KEYS


def test_any_of_the_keys_opens_the_server_and_nothing_else(guarded: Running) -> None:
    for key in KEYS:
        reported = {"authorization": f"Bearer {key}"}
        assert guarded.http.get("/v1/models", headers=reported).status_code == 200
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
