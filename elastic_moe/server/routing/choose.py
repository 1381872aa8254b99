"""Which sub-network a request gets: from its model's name, its routing_config, its profile.

Then the operator's limits hold, and what was injected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from elastic_moe.config import ElasticRoutingConfig
from elastic_moe.protocol.profiles import Profile
from elastic_moe.protocol.routing import RoutingConfig, changes
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.routing import ModelShape, Subnet
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.faults import Injection
from elastic_moe.server.observe.account import Account
from elastic_moe.server.routing.limits import Limits

R = TypeVar("R", bound=SamplingRequest)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a request gets.

    Attributes:
        subnet: that runs.
        asked: that was asked for.
        profile: its name, if one was asked for.
    """

    subnet: Subnet
    asked: Subnet
    profile: str | None = None

    def told(self) -> dict[str, Any]:
        """What the answer says of the way to the sub-network."""
        told: dict[str, Any] = {}
        if self.profile is not None:
            told["profile"] = self.profile
        if self.subnet != self.asked:
            told["limited"] = {
                axis: {"asked": asked, "applied": applied}
                for axis, (asked, applied) in changes(self.asked, self.subnet).items()
            }
        return told


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for; what it gets may depend on how many tokens it takes.

    Attributes:
        subnet: it asks for this one,
        profile: or for what this says, which has a name,
        own: if it brings no sub-network of its own.
        account: where it is noted what it got.
    """

    limits: Limits
    subnet: Subnet
    name: str | None = None
    profile: Profile | None = None
    own: bool = True
    injection: Injection | None = None
    account: Account = field(default_factory=Account)

    def choose(self, tokens: int) -> Chosen:
        """What it gets.

        Args:
            tokens: of its longest prompt and max_tokens.

        Raises:
            RoutingError: the limits refuse it.
        """
        asked = self.subnet
        if self.profile is not None and not self.own:
            asked = resolve_config(asked.shape, self.profile.routing_for(tokens))
        runs = self.limits.apply(asked)
        if self.injection is not None:
            runs = jittered(runs, self.injection)
        self.account.subnet = runs.name
        return Chosen(runs, asked, self.name)

    def fill(self, body: R) -> R:
        """A request with the profile's sampling where it says none.

        Raises:
            ApiError: it says something else where the profile is locked.
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
                    f"{knob} is {profiles} in the profile {self.name} and locked, got {own}. "
                    f"Leave it out, or ask for another profile.",
                    param=knob,
                )
        return body.model_copy(update=filled)


def resolve_config(shape: ModelShape, config: RoutingConfig) -> Subnet:
    """The sub-network that a `routing_config` means.

    Raises:
        RoutingError: the model does not have it.
    """
    return ElasticRoutingConfig.full(**config.knobs(shape.num_layers)).resolve(shape)


def check_profile(shape: ModelShape, profile: Profile) -> None:
    """Raise `RoutingError` unless the model has what a profile says."""
    steps = profile.top_k_by_tokens
    for step in steps or (None,):
        config = profile.routing
        if step is not None:
            config = config.model_copy(update={"top_k": step.top_k})
        resolve_config(shape, config)


def jittered(subnet: Subnet, injection: Injection) -> Subnet:
    """A sub-network somewhat below this one, as an overloaded API might run."""
    most = injection.effects.routing_jitter
    if most is None:
        return subnet
    depth, top_k = (1 - injection.draw.uniform(0, most) for _ in range(2))
    limits = Limits(depth=(None, max(1, round(subnet.depth * depth))))
    shrunk = limits.apply(subnet)
    ks = [layer.top_k for layer in shrunk.layers if layer.active and layer.top_k]
    highest = max(1, round(max(ks, default=1) * top_k))
    return Limits(top_k=(None, highest)).apply(shrunk)
