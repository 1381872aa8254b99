"""What goes wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, TypedDict, Unpack

Span = float | list[float]  # milliseconds, or [least, most] to draw from


class Rule(TypedDict, total=False):
    """Which requests something happens to, and what; as in `PUT /admin/faults`.

    Which, of those to `path` (None: all of /v1/), numbered from 1 since the plan was set: a share
    `rate`, `count` at most, not the first `skip`, only the numbers `at`, between `after_seconds`
    and `until_seconds`.

    What: `error` answers with this status (and `retry_after`, in seconds); `latency_ms`, `ttft_ms`
    and `itl_ms` make it slow; `drop_after` closes the connection after so many events (0: before
    the answer begins), `malformed_after` spoils the event after so many, `stall_after` sends
    nothing more; `routing_jitter` shrinks the sub-network; `force_text` is the answer's text.
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
    """The faults of one server. Every change sets the whole plan, so that all counts begin anew.

    As a context manager it clears them at the end.
    """

    def __init__(self, admin: Callable[..., Any]) -> None:
        """`admin(method, path, body)` asks the server."""
        self._admin = admin

    @property
    def plan(self) -> dict[str, Any]:
        """What is in force, as in `PUT /admin/faults`."""
        plan: dict[str, Any] = self._admin("GET", "/admin/faults")["plan"]
        return plan

    @property
    def injected(self) -> list[int]:
        """How many requests each rule has struck."""
        counts = self._admin("GET", "/admin/faults")["counts"]
        return [one["injected"] for one in counts]

    def add(self, **rule: Unpack[Rule]) -> Self:
        """Do something to requests: `add(error=429, retry_after=1, count=2)`; see `Rule`.

        A request is struck by the first rule that fits.

        Raises:
            ServerError: there is no such fault; what is in force stays.
        """
        plan = self.plan
        return self.set({**plan, "rules": [*plan["rules"], rule]})

    def remote(self) -> Self:
        """Give every request a round trip of 200 to 400 ms, beside what rules do."""
        return self.set({**self.plan, "preset": "remote"})

    def seed(self, seed: int) -> Self:
        """Draw rates, spans and jitter otherwise; 0 at first."""
        return self.set({**self.plan, "seed": seed})

    def set(self, plan: Mapping[str, Any]) -> Self:
        """Put a whole plan in force, as in `PUT /admin/faults`."""
        self._admin("PUT", "/admin/faults", plan)
        return self

    def clear(self) -> None:
        """Let nothing go wrong any more."""
        self._admin("DELETE", "/admin/faults")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
