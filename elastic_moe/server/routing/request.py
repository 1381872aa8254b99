"""A request's routing: from its model's name, its routing_config and its profile to a sub-network.

The operator's limits apply last, then injected faults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from elastic_moe.engine import Engine
from elastic_moe.errors import RoutingError
from elastic_moe.protocol.admin.profiles import Profile
from elastic_moe.protocol.routing import RoutingConfig, changes
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.routing import Subnet
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.fault_selection import Injection
from elastic_moe.server.routing.limits import Limits
from elastic_moe.server.routing.profiles import ProfileBook

R = TypeVar("R", bound=SamplingRequest)


@dataclass(frozen=True, slots=True)
class ResolvedRouting:
    """The sub-network that a request runs.

    Attributes:
        subnet: runs.
        requested: was requested.
        profile: name of the profile requested, if any.
    """

    subnet: Subnet
    requested: Subnet
    profile: str | None = None

    def report(self) -> dict[str, Any]:
        """`profile` and `limited` of the answer's `routing`."""
        report: dict[str, Any] = {}
        if self.profile is not None:
            report["profile"] = self.profile
        if self.subnet != self.requested:
            report["limited"] = {
                axis: {"asked": requested, "applied": applied}
                for axis, (requested, applied) in changes(self.requested, self.subnet).items()
            }
        return report


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """The routing that a request asks for; a profile may make it depend on the request's tokens.

    Attributes:
        limits: of the server.
        subnet: of its routing_config or its model's name; else the server's default.
        explicit: whether the request names that sub-network itself. If not, `profile` decides.
        profile_name, profile: requested by name, if any.
        injection: faults that are injected into the request.
    """

    limits: Limits
    subnet: Subnet
    explicit: bool
    profile_name: str | None = None
    profile: Profile | None = None
    injection: Injection | None = None

    def resolve(self, tokens: int) -> ResolvedRouting:
        """The sub-network that runs.

        Args:
            tokens: of the request's longest prompt and max_tokens.

        Raises:
            RoutingError: the limits refuse it.
        """
        requested = self.subnet
        if self.profile is not None and not self.explicit:
            requested = self.profile.routing_for(tokens).resolve(requested.shape)
        subnet = self.limits.apply(requested)
        if self.injection is not None:
            subnet = _jittered(subnet, self.injection)
        return ResolvedRouting(subnet, requested, self.profile_name)

    def with_sampling(self, body: R) -> R:
        """The request with the profile's sampling where it has none of its own.

        Raises:
            ApiError: it has another value of its own where the profile is locked.
        """
        if self.profile is None:
            return body
        filled = {}
        for knob in ("temperature", "top_p", "seed"):
            own, profiles = getattr(body, knob), getattr(self.profile, knob)
            if profiles is None or own == profiles:
                continue
            if own is None:
                filled[knob] = profiles
            elif knob in self.profile.locked:
                raise ApiError(
                    400,
                    f"{knob} is {profiles} in the profile {self.profile_name} and locked, got "
                    f"{own}. Leave it out, or ask for another profile.",
                    param=knob,
                )
        return body.model_copy(update=filled)


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """The sub-networks that requests to a server may ask for.

    Attributes:
        engine: resolves names and configurations.
        names: of the model, that requests may use.
        default: the sub-network of requests that ask for none.
        profiles: routing and sampling that requests may ask for by name.
        limits: of the operator.
    """

    engine: Engine
    names: tuple[str, ...]
    default: Subnet
    profiles: ProfileBook
    limits: Limits

    def request(
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
            self.limits,
            own or self.default,
            explicit=own is not None,
            profile_name=profile,
            profile=found,
            injection=injection,
        )


def _jittered(subnet: Subnet, injection: Injection) -> Subnet:
    """A sub-network somewhat below this one, as an overloaded API might run."""
    most = injection.effects.routing_jitter
    if most is None:
        return subnet
    depth, top_k = (1 - injection.rng.uniform(0, most) for _ in range(2))
    shrunk = Limits(depth=(None, max(1, round(subnet.depth * depth)))).apply(subnet)
    ks = [shrunk.layers[i].top_k for i in shrunk.routed_layers]
    return Limits(top_k=(None, max(1, round(max(ks, default=1) * top_k)))).apply(shrunk)
