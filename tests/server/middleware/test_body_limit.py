"""Bodies above the size limit."""

from __future__ import annotations

import json

from tests.server.conftest import Running


def test_a_body_that_is_too_large_is_refused_with_or_without_a_length(guarded: Running) -> None:
    big = json.dumps({"model": "tiny", "prompt": "x" * 3000}).encode()
    kind = {"content-type": "application/json"}
    for content in (big, iter([big[:1000], big[1000:]])):
        answer = guarded.http.post("/v1/completions", content=content, headers=kind)
        assert answer.status_code == 413
        assert "2000 bytes" in answer.json()["error"]["message"]
    guarded.complete("x" * 300, max_tokens=1)
