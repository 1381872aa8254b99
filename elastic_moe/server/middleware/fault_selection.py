"""Which request gets which fault: its own x-inject-* headers, else the rules of the plan."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

from pydantic import ValidationError

from elastic_moe.protocol.admin.faults import Effects, FaultPlan, FaultRule, FaultState, RuleCount
from elastic_moe.routing import shorten
from elastic_moe.server.errors import ApiError

PREFIX = b"x-inject-"
FORCE_TEXT = b"x-force-text"
REMOTE_MS = [200.0, 400.0]  # the round trip of preset "remote"
_INTEGERS = {"error", "drop_after", "malformed_after", "stall_after"}


@dataclass(frozen=True, slots=True)
class Injection:
    """The faults of one request.

    Attributes:
        rng: seeded by the plan and the request's number.
    """

    effects: Effects
    rng: random.Random

    def seconds(self, name: Literal["latency_ms", "ttft_ms", "itl_ms"]) -> float:
        """A delay, drawn from its span at every call; 0 if there is none."""
        span: float | list[float] | None = getattr(self.effects, name)
        if span is None:
            return 0.0
        return (self.rng.uniform(*span) if isinstance(span, list) else span) / 1000


class _CountedRule:
    """A rule, the requests to its path, and those of them that got its fault."""

    def __init__(self, rule: FaultRule) -> None:
        self.rule, self.matched, self.injected = rule, 0, 0

    def applies(self, path: str, seconds: float, seed: str) -> bool:
        """Count a request, and decide whether it gets the fault.

        Args:
            seconds: since the plan was set.
        """
        rule = self.rule
        if rule.path not in (None, path):
            return False
        self.matched += 1
        applies = (
            self.matched > rule.skip
            and (rule.at is None or self.matched in rule.at)
            and rule.after_seconds <= seconds
            and (rule.until_seconds is None or seconds < rule.until_seconds)
            and (rule.count is None or self.injected < rule.count)
            and random.Random(f"{seed} {self.matched}").random() < rule.rate
        )
        self.injected += applies
        return applies


@dataclass(slots=True)
class FaultSelector:
    """Holds the active plan, and selects the faults of every request by it."""

    plan: FaultPlan = field(default_factory=FaultPlan)
    _rules: list[_CountedRule] = field(default_factory=list)
    _set_at: float = 0.0
    _requests: int = 0

    def set(self, plan: FaultPlan) -> None:
        """Replace the plan; all counts restart at 0."""
        self.plan, self._requests = plan, 0
        self._rules = [_CountedRule(rule) for rule in plan.rules]
        self._set_at = time.monotonic()

    def state(self) -> FaultState:
        """The plan and the counts of its rules."""
        counts = [RuleCount(matched=r.matched, injected=r.injected) for r in self._rules]
        return FaultState(plan=self.plan, counts=counts)

    def select(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Injection | None:
        """The faults of a request; its headers replace the rules. Counts the request.

        Raises:
            ApiError: a fault header is unknown, or its value is out of range.
        """
        effects = effects_from_headers(headers)
        self._requests += 1
        if effects is None:
            seconds, seed = time.monotonic() - self._set_at, self.plan.seed
            for number, counted in enumerate(self._rules):
                if counted.applies(path, seconds, f"{seed} {number}"):
                    rule = counted.rule
                    effects = Effects(**{name: getattr(rule, name) for name in rule.given()})
                    break
        if self.plan.preset == "remote":
            effects = effects or Effects()
            if effects.latency_ms is None:
                effects = effects.model_copy(update={"latency_ms": REMOTE_MS})
        if effects is None:
            return None
        return Injection(effects, random.Random(f"{self.plan.seed} request {self._requests}"))


def effects_from_headers(headers: Iterable[tuple[bytes, bytes]]) -> Effects | None:
    """The faults that a request's own headers ask for; None if there are no such headers.

    Raises:
        ApiError: a fault header is unknown, or its value is out of range.
    """
    given: dict[str, Any] = {}
    for header, value in headers:
        if not (header.startswith(PREFIX) or header == FORCE_TEXT):
            continue
        header_name, text = header.decode("latin-1"), value.decode("latin-1").strip()
        name = header_name.removeprefix("x-inject-").replace("-", "_")
        if header == FORCE_TEXT:
            given["force_text"] = unquote(text, errors="replace")
        elif name not in Effects.model_fields or name == "force_text":
            known = [n.replace("_", "-") for n in Effects.model_fields if n != "force_text"]
            raise ApiError(
                400,
                f"unknown header {shorten(header_name)}; there are x-force-text and x-inject- with "
                f"{', '.join(known)}.",
                param=header_name,
            )
        else:
            given[name] = _number(header_name, name, text)
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
    """The value of a header: a number, or a span such as 200-400."""
    try:
        if name in _INTEGERS:
            return int(text)
        parts = [float(part) for part in text.split("-")] if name.endswith("_ms") else [float(text)]
        return parts if len(parts) > 1 else parts[0]
    except ValueError:
        allowed = "a whole number" if name in _INTEGERS else "a number"
        if name.endswith("_ms"):
            allowed = "milliseconds, or a span of them such as 200-400"
        raise ApiError(
            400, f"{header} must be {allowed}, got {shorten(text)}.", param=header
        ) from None
