"""Profiles: sub-networks and sampling with a name, which requests ask for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from elastic_moe.config import RoutingConfig
from elastic_moe.protocol.base import Answer, Body, Count
from elastic_moe.routing.axes import TOP_K


class TopKStep(Body):
    """A line of a profile's rule for top_k.

    Attributes:
        up_to: requests of at most so many tokens; absent in the last line, which takes the rest.
    """

    up_to: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=1)]


class Profile(Body):
    """What a request gets that names it.

    Attributes:
        description: for people.
        routing: the sub-network; what is absent means the model's full value.
        top_k_by_tokens: experts per token, from how many tokens the request may take: its prompt's
            and max_tokens. The first line that is wide enough says it.
        pinned: no request may bring a sub-network of its own; else it replaces the profile's.
        temperature, top_p, seed: of requests that say none.
        locked: those of them that no request may change.
    """

    description: str = ""
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    top_k_by_tokens: Annotated[list[TopKStep], Field(min_length=1)] | None = None
    pinned: bool = False
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Count | None = None
    locked: list[Literal["temperature", "top_p", "seed"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _together(self) -> Profile:
        steps = self.top_k_by_tokens
        if steps is not None:
            if self.routing.value(TOP_K) is not None:
                raise ValueError("routing.top_k and top_k_by_tokens are both given; keep one")
            bounds = [step.up_to for step in steps]
            known = [bound for bound in bounds[:-1] if bound is not None]
            if bounds[-1] is not None or len(known) < len(bounds) - 1 or known != sorted({*known}):
                raise ValueError("top_k_by_tokens: up_to must ascend, and be absent in the last")
        for name in self.locked:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is locked, but the profile does not say it")
        return self

    @property
    def routings(self) -> list[RoutingConfig]:
        """Every sub-network that it may mean."""
        steps = self.top_k_by_tokens
        if steps is None:
            return [self.routing]
        return [self.routing.with_value(TOP_K, step.top_k) for step in steps]

    def routing_for(self, tokens: int) -> RoutingConfig:
        """The sub-network of a request that may take so many tokens."""
        for step in self.top_k_by_tokens or ():
            if step.up_to is None or tokens <= step.up_to:
                return self.routing.with_value(TOP_K, step.top_k)
        return self.routing


class NamedProfile(Answer):
    """A profile with its name."""

    name: str
    profile: Profile


class ProfileList(Answer):
    """All profiles."""

    profiles: list[NamedProfile]
