"""What all endpoints share: the engine, its names, and the routing of requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from elastic_moe.engine import Engine
from elastic_moe.engine.outputs import AppliedRouting, Usage
from elastic_moe.errors import RoutingError
from elastic_moe.protocol.faults import FaultPlan
from elastic_moe.protocol.routing import RoutingConfig, values
from elastic_moe.routing import Subnet
from elastic_moe.server.api.logprobs import LogprobWriter
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.fault_selection import FaultSelector, Injection
from elastic_moe.server.observe.metrics import Metrics
from elastic_moe.server.observe.request_history import RequestHistory
from elastic_moe.server.routing.profiles import ProfileBook
from elastic_moe.server.routing.request import ResolvedRouting, RoutingRequest
from elastic_moe.server.settings import ServerSettings


@dataclass(slots=True)
class Service:
    """One engine behind a server.

    Attributes:
        created: start of the server, in seconds since 1970.
        default: the sub-network of requests that ask for none.
        profiles: routing and sampling that requests may ask for by name.
        faults: fault injection; None without --inject.
        requests: the last requests; kept with fault injection only.
        logprobs: writes log-probabilities with the texts of their tokens.
        metrics: of the requests that have ended.
        ready: whether the server accepts requests.
    """

    engine: Engine
    settings: ServerSettings
    created: int
    default: Subnet
    logprobs: LogprobWriter
    profiles: ProfileBook
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
        faults = None
        if settings.inject != "off":
            faults = FaultSelector()
            faults.set(FaultPlan(preset="remote" if settings.inject == "remote" else None))
        return cls(
            engine,
            settings,
            int(time.time()),
            default,
            LogprobWriter(engine.tokenizer),
            ProfileBook.open(settings.profiles, shape),
            faults,
            RequestHistory(),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Model names that requests may use."""
        return tuple(dict.fromkeys((self.engine.name, *self.settings.aliases)))

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: the backend, its instruction-set level and the dtype."""
        engine = self.engine
        parts = ("em", engine.backend, engine.runner.level, engine.dtype)
        return "-".join(part for part in parts if part is not None)

    def check_model(self, model: str) -> None:
        """Raise `ApiError` or `RoutingError` unless requests may ask for this name."""
        self.routing_request(model, None, None)

    def routing_request(
        self,
        model: str,
        config: RoutingConfig | None,
        profile: str | None,
        injection: Injection | None = None,
    ) -> RoutingRequest:
        """The routing that a model's name, a `routing_config` and a profile ask for.

        Raises:
            ApiError: there is no such model, or the profile is pinned.
            ProfileNotFoundError: there is no such profile.
            RoutingError: they mean different sub-networks, or the model does not have one.
        """
        name, at, suffix = model.partition("@")
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {model[:80]!a} does not exist; there are {', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
        by_name = None
        if at and suffix in self.profiles:
            if profile not in (None, suffix):
                raise ApiError(
                    400,
                    f"the model's name asks for the profile {suffix}, and profile for "
                    f"{profile[:80]!a}. Ask in one place.",
                    param="profile",
                )
            profile = suffix
        elif at:
            by_name = self.engine.resolve(suffix)
        by_config = None if config is None else config.resolve(self.engine.shape)
        if by_name is not None and by_config not in (None, by_name):
            raise RoutingError(
                f"the model's name asks for {by_name.name} and routing_config for "
                f"{by_config.name}. Ask in one place."
            )
        own = by_config or by_name
        found = None if profile is None else self.profiles.get(profile)
        if own is not None and found and found.pinned and own != found.routing.resolve(own.shape):
            raise ApiError(
                400,
                f"the profile {profile} is pinned: requests that name it cannot bring a "
                f"sub-network of their own, got {own.name}.",
                param="routing_config",
                code="profile_pinned",
            )
        return RoutingRequest(
            self.settings.limits,
            own or self.default,
            explicit=own is not None,
            profile_name=profile,
            profile=found,
            injection=injection,
        )

    def applied(self, routing: ResolvedRouting, applied: AppliedRouting) -> dict[str, Any]:
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
