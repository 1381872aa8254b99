"""Which request meets which fault: from its own headers, or from a plan that is set for all."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from elastic_moe.protocol.faults import Effects, FaultPlan, FaultRule, FaultState, RuleCount
from elastic_moe.routing import Subnet, shorten
from elastic_moe.server.errors import ApiError
from elastic_moe.server.routing.limits import Limits

PREFIX = b"x-inject-"
FORCE_TEXT = b"x-force-text"
REMOTE_MS = [200.0, 400.0]  # a round trip to a remote API
_WHOLE = {"error", "drop_after", "malformed_after", "stall_after"}


@dataclass(frozen=True, slots=True)
class Injection:
    """What happens to one request.

    Attributes:
        draw: of its random numbers.
    """

    effects: Effects
    draw: random.Random

    def seconds(self, name: str) -> float:
        """A time of the effects, drawn anew; 0 if it is not asked for."""
        span = getattr(self.effects, name)
        if span is None:
            return 0.0
        return (self.draw.uniform(*span) if isinstance(span, list) else float(span)) / 1000

    def reduced(self, subnet: Subnet) -> Subnet:
        """A sub-network somewhat below this one, as an overloaded API might run."""
        most = self.effects.routing_jitter
        if most is None:
            return subnet
        depth, top_k = (1 - self.draw.uniform(0, most) for _ in range(2))
        shrunk = Limits(depth=(None, max(1, round(subnet.depth * depth)))).apply(subnet)
        ks = [shrunk.layers[i].top_k for i in shrunk.routed_layers]
        return Limits(top_k=(None, max(1, round(max(ks, default=1) * top_k)))).apply(shrunk)


class _Counts:
    """What a rule has done so far."""

    def __init__(self, rule: FaultRule) -> None:
        self.rule, self.matched, self.injected = rule, 0, 0

    def strikes(self, path: str, seconds: float, seed: str) -> bool:
        """Count a request; whether the rule strikes it."""
        rule = self.rule
        if rule.path not in (None, path):
            return False
        self.matched += 1
        struck = (
            self.matched > rule.skip
            and (rule.at is None or self.matched in rule.at)
            and rule.after_seconds <= seconds
            and (rule.until_seconds is None or seconds < rule.until_seconds)
            and (rule.count is None or self.injected < rule.count)
            and random.Random(f"{seed} {self.matched}").random() < rule.rate
        )
        self.injected += struck
        return struck


@dataclass(slots=True)
class FaultBook:
    """The plan that is in force; replaced as a whole."""

    plan: FaultPlan = field(default_factory=FaultPlan)
    _counts: list[_Counts] = field(default_factory=list)
    _since: float = 0.0
    _requests: int = 0

    def set(self, plan: FaultPlan) -> None:
        """Put a plan in force; all counting begins anew."""
        self.plan, self._requests = plan, 0
        self._counts = [_Counts(rule) for rule in plan.rules]
        self._since = time.monotonic()

    def state(self) -> FaultState:
        """The plan, and what it did."""
        counts = [RuleCount(matched=c.matched, injected=c.injected) for c in self._counts]
        return FaultState(plan=self.plan, counts=counts)

    def meet(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Injection | None:
        """What happens to a request. Its own headers come in place of the rules.

        Raises:
            ApiError: a header says nothing that could be done.
        """
        own = effects_of(headers)
        self._requests += 1
        struck: Effects | None = own
        if own is None:
            seconds, seed = time.monotonic() - self._since, self.plan.seed
            for number, counts in enumerate(self._counts):
                if counts.strikes(path, seconds, f"{seed} {number}"):
                    rule = counts.rule
                    struck = Effects(**{name: getattr(rule, name) for name in rule.given()})
                    break
        if self.plan.preset == "remote":
            struck = struck or Effects()
            if struck.latency_ms is None:
                struck = struck.model_copy(update={"latency_ms": REMOTE_MS})
        if struck is None:
            return None
        return Injection(struck, random.Random(f"{self.plan.seed} request {self._requests}"))


def effects_of(headers: Iterable[tuple[bytes, bytes]]) -> Effects | None:
    """What a request's own headers ask for; None if they ask for nothing.

    Raises:
        ApiError: one of them is unknown, or its value out of range.
    """
    given: dict[str, Any] = {}
    for header, value in headers:
        if not (header.startswith(PREFIX) or header == FORCE_TEXT):
            continue
        told, text = header.decode("latin-1"), value.decode("latin-1").strip()
        name = told.removeprefix("x-inject-").replace("-", "_")
        if header == FORCE_TEXT:
            given["force_text"] = unquote(text, errors="replace")
        elif name not in Effects.model_fields or name == "force_text":
            known = [n.replace("_", "-") for n in Effects.model_fields if n != "force_text"]
            raise ApiError(
                400,
                f"unknown header {shorten(told)}; there are x-force-text and x-inject- with "
                f"{', '.join(known)}.",
                param=told,
            )
        else:
            given[name] = _number(told, name, text)
    if not given:
        return None
    try:
        return Effects(**given)
    except ValidationError as error:
        fault = error.errors()[0]
        where = str(fault["loc"][0]).replace("_", "-") if fault["loc"] else ""
        param = f"x-inject-{where}" if where != "force-text" else "x-force-text"
        raise ApiError(
            400, f"{param if where else 'x-inject headers'}: {fault['msg']}.", param=param
        ) from None


def _number(header: str, name: str, text: str) -> int | float | list[float]:
    """A header's value: a number, or a span such as 200-400."""
    try:
        if name in _WHOLE:
            return int(text)
        parts = [float(part) for part in text.split("-")] if name.endswith("_ms") else [float(text)]
        return parts if len(parts) > 1 else parts[0]
    except ValueError:
        allowed = "a whole number" if name in _WHOLE else "a number"
        if name.endswith("_ms"):
            allowed = "milliseconds, or a span of them such as 200-400"
        raise ApiError(
            400, f"{header} must be {allowed}, got {shorten(text)}.", param=header
        ) from None
