"""Fault injection of a running server, by /admin/faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, TypedDict, Unpack

Span = float | list[float]  # milliseconds, or [min, max] to draw from


class Rule(TypedDict, total=False):
    """Faults, and the requests that get them; as in `PUT /admin/faults`.

    Requests to `path` (None: all of /v1/) are numbered from 1 since the plan was set. The rule
    applies to a share `rate` of them, to `count` at most, not to the first `skip`, only to the
    numbers `at`, and between `after_seconds` and `until_seconds`.

    `error` answers with this status (and `retry_after`, in seconds). `latency_ms`, `ttft_ms` and
    `itl_ms` delay. After so many events `drop_after` closes the connection (0: before the response
    starts), `malformed_after` corrupts the next event, and `stall_after` sends nothing more.
    `routing_jitter` reduces the sub-network. `force_text` is the text of the answer.
    """

    path: str | None
    rate: float
    count: int
    skip: int
    at: list[int]
    after_seconds: float
    until_seconds: float
    error: int
    retry_after: float
    latency_ms: Span
    ttft_ms: Span
    itl_ms: Span
    drop_after: int
    malformed_after: int
    stall_after: int
    routing_jitter: float
    force_text: str


class Faults:
    """The fault plan of one server. Every change restarts all counts at 0.

    As a context manager it clears the plan at the end.
    """

    def __init__(self, admin: Callable[..., Any]) -> None:
        """`admin(method, path, body)` calls an admin endpoint."""
        self._admin = admin

    @property
    def plan(self) -> dict[str, Any]:
        """The active plan, as in `PUT /admin/faults`."""
        plan: dict[str, Any] = self._admin("GET", "/admin/faults")["plan"]
        return plan

    @property
    def injected(self) -> list[int]:
        """Number of requests that each rule applied to."""
        counts = self._admin("GET", "/admin/faults")["counts"]
        return [one["injected"] for one in counts]

    def add(self, **rule: Unpack[Rule]) -> Self:
        """Add a rule: `add(error=429, retry_after=1, count=2)`; see `Rule`.

        A request gets the faults of the first rule that applies.

        Raises:
            ServerError: the rule is invalid; the plan stays as it was.
        """
        plan = self.plan
        return self.set({**plan, "rules": [*plan["rules"], rule]})

    def remote(self) -> Self:
        """Add 200 to 400 ms of latency to every request, besides the rules."""
        return self.set({**self.plan, "preset": "remote"})

    def seed(self, seed: int) -> Self:
        """Set the seed of rates, spans and jitter; 0 at first."""
        return self.set({**self.plan, "seed": seed})

    def set(self, plan: Mapping[str, Any]) -> Self:
        """Replace the plan, as in `PUT /admin/faults`."""
        self._admin("PUT", "/admin/faults", plan)
        return self

    def clear(self) -> None:
        """Inject no more faults."""
        self._admin("DELETE", "/admin/faults")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
