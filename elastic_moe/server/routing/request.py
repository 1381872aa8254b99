"""A request's routing: from its model's name, its routing_config and its profile to a sub-network.

The operator's limits apply last, then injected faults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from elastic_moe.protocol.profiles import Profile
from elastic_moe.protocol.routing import changes
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.routing import Subnet
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.fault_selection import Injection
from elastic_moe.server.routing.limits import Limits

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
            subnet = self.injection.reduced(subnet)
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
