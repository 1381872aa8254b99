"""x-ratelimit-* headers and Retry-After: how much more the engine takes in, and when.

There is one limit: of requests that are unfinished. No limit of tokens, so no headers of one.
"""

from __future__ import annotations

import math

from elastic_moe.engine import Engine
from elastic_moe.errors import EngineError
from elastic_moe.server.observe.metrics import Metrics

LIMITED_PATHS = {"/v1/chat/completions", "/v1/completions"}


def rate_limits(engine: Engine, metrics: Metrics) -> dict[str, str]:
    """The headers, as things are now.

    The time until all is free again is an estimate from how long requests ran lately; where nothing
    is known, there is no such header.
    """
    try:
        stats = engine.stats()
    except EngineError:  # closed: it takes nothing, and the answer says so
        return {}
    limit = engine.engine_config.max_queue
    headers = {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(max(0, limit - stats.unfinished)),
    }
    seconds = metrics.run_seconds if stats.unfinished else 0.0
    if seconds is not None:
        rounds = max(1.0, stats.unfinished / max(1, stats.running))
        headers["x-ratelimit-reset-requests"] = f"{round(seconds * rounds, 3):g}s"
    return headers


def retry_after(engine: Engine, metrics: Metrics) -> int:
    """Whole seconds, at least 1, until one of the requests that run has probably ended."""
    if metrics.run_seconds is None:
        return 1
    return max(1, math.ceil(metrics.run_seconds / max(1, engine.stats().running)))
