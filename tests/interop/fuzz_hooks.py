"""Hooks of schemathesis: its requests reach the model, and ask for little work.

Without them nearly every body names a model that does not exist, which ends it at once.
"""

from __future__ import annotations

from typing import Any

import schemathesis

MODEL = "elastic-mini"
MOST_TOKENS = 8


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:  # noqa: ARG001  (its interface)
    """Change a request right before it is sent; what is wrong with it stays wrong."""
    if not isinstance(case.body, dict):
        return
    body = dict(case.body)
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    if _generates(case.operation):
        for name in ("max_tokens", "max_completion_tokens"):
            if type(body.get(name)) is int:
                body[name] = min(body[name], MOST_TOKENS)
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = MOST_TOKENS
    case.body = body


def _generates(operation: Any) -> bool:
    """Whether /openapi.json says that the operation can stream."""
    answer = operation.definition.raw["responses"].get("200", {})
    return "text/event-stream" in answer.get("content", {})
