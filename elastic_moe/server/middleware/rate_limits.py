"""x-ratelimit-* headers and Retry-After: how many more requests the engine accepts, and when.

The only limit is the number of unfinished requests. There is none of tokens, hence no headers.
"""

from __future__ import annotations

import math

from elastic_moe.engine import Engine
from elastic_moe.errors import EngineError
from elastic_moe.server.observe.metrics import Metrics


def rate_limit_headers(engine: Engine, metrics: Metrics) -> dict[str, str]:
    """The x-ratelimit-* headers of now; empty if the engine is closed.

    The reset time is estimated from the duration of recent generations; without any the header is
    missing.
    """
    try:
        stats = engine.stats()
    except EngineError:
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


def retry_after_seconds(engine: Engine, metrics: Metrics) -> int:
    """Whole seconds, at least 1, until a running request has probably ended."""
    if metrics.run_seconds is None:
        return 1
    return max(1, math.ceil(metrics.run_seconds / max(1, engine.stats().running)))
