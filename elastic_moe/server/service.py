"""What all endpoints share: the engine, its names, and the routing of requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from elastic_moe.engine import Engine
from elastic_moe.engine.outputs import RoutingStats, Usage
from elastic_moe.protocol.admin.faults import FaultPlan
from elastic_moe.protocol.routing import values
from elastic_moe.server.api.logprobs import LogprobWriter
from elastic_moe.server.middleware.fault_selection import FaultSelector
from elastic_moe.server.observe.metrics import Metrics
from elastic_moe.server.observe.request_history import RequestHistory
from elastic_moe.server.routing.profiles import ProfileBook
from elastic_moe.server.routing.request import ResolvedRouting, RoutingPolicy
from elastic_moe.server.settings import ServerSettings


@dataclass(slots=True)
class Service:
    """One engine behind a server.

    Attributes:
        created: start of the server, in seconds since 1970.
        routing: the sub-networks that requests may ask for.
        faults: fault injection; None without --inject.
        requests: the last requests; kept with fault injection only.
        logprobs: writes log-probabilities with the texts of their tokens.
        metrics: of the requests that have ended.
        ready: whether the server accepts requests.
    """

    engine: Engine
    settings: ServerSettings
    created: int
    routing: RoutingPolicy
    logprobs: LogprobWriter
    faults: FaultSelector | None
    requests: RequestHistory
    metrics: Metrics = field(default_factory=Metrics)
    ready: bool = True

    @classmethod
    def of(cls, engine: Engine, settings: ServerSettings) -> Service:
        """Raises: RoutingError, ServerError: the model cannot do what the settings say."""
        shape, limits = engine.shape, settings.limits
        limits.check(shape)
        default = engine.resolve(settings.routing)
        limits.apply(default)
        names = tuple(dict.fromkeys((engine.name, *settings.aliases)))
        faults = None
        if settings.inject != "off":
            faults = FaultSelector()
            faults.set(FaultPlan(preset="remote" if settings.inject == "remote" else None))
        return cls(
            engine,
            settings,
            int(time.time()),
            RoutingPolicy(
                engine, names, default, ProfileBook.open(settings.profiles, shape), limits
            ),
            LogprobWriter(engine.tokenizer),
            faults,
            RequestHistory(),
        )

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: the backend, its instruction-set level and the dtype."""
        engine = self.engine
        parts = ("em", engine.backend, engine.runner.level, engine.dtype)
        return "-".join(part for part in parts if part is not None)

    def check_model(self, model: str) -> None:
        """Raise `ApiError` or `RoutingError` unless requests may ask for this name."""
        self.routing.request(model, None, None)

    def applied(self, routing: ResolvedRouting, applied: RoutingStats) -> dict[str, Any]:
        """`protocol.AppliedRouting` of a request that has ended."""
        return {
            "name": applied.name,
            "model": self.engine.name,
            **values(routing.subnet),
            "active_params": applied.active_params,
            "flops_per_token": applied.flops_per_token,
            "mean_experts": applied.mean_experts,
            **routing.report(),
        }


def usage(*parts: Usage) -> dict[str, Any]:
    """`protocol.Usage` of all prompts of a request."""
    read = sum(part.prompt_tokens for part in parts)
    written = sum(part.completion_tokens for part in parts)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(part.cached_tokens for part in parts)},
    }
