"""The record of one HTTP request: metrics, the log line and /admin/requests read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from elastic_moe.engine.outputs import Completion

ACCESS_RECORD = "elastic_moe.access_record"  # key of an ASGI scope
OTHER_ENDPOINT = "other"
MAX_KEPT_BYTES = 1 << 20  # of a request body, and of a response
Outcome = Literal["running", "complete", "error", "timeout", "gone", "truncated"]


@dataclass(slots=True)
class AccessRecord:
    """One request, while it runs and after. Prompts and answers are in it under --inject alone.

    Attributes:
        path: as the client wrote it.
        endpoint: the route that answers it, such as /v1/models/{model}.
        started, ended: seconds on the clock of time.perf_counter; `ended` is None while it runs.
        status: of the response; None before the response starts.
        subnet: name of its sub-network, once chosen.
        completions: what the engine finished, one per prompt.
        response_complete: the last byte of the response went out.
        failed: an error occurred after the response had started.
        disconnected: the client closed the connection before the response was complete.
        timed_out: "read": the body arrived too late; "request": the answer took too long.
        number: its place in `RequestHistory`; 0 if it is not in one.
        request_body: as received; empty if longer than `MAX_KEPT_BYTES`.
        response_body: the first `MAX_KEPT_BYTES` sent; None if they are not kept.
        injected: the injected effects, such as {"error": 429}.
        damaged: fault injection cut or corrupted the response.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    endpoint: str = OTHER_ENDPOINT
    started: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    status: int | None = None
    subnet: str | None = None
    completions: list[Completion] = field(default_factory=list)
    response_complete: bool = False
    failed: bool = False
    disconnected: bool = False
    timed_out: Literal["read", "request"] | None = None
    number: int = 0
    request_body: bytes = b""
    response_body: bytearray | None = None
    injected: dict[str, object] | None = None
    damaged: bool = False

    def end(self) -> None:
        """Stop the clock; later calls have no effect."""
        if self.ended is None:
            self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Duration of the request; 0 while it runs."""
        return 0.0 if self.ended is None else self.ended - self.started

    @property
    def outcome(self) -> Outcome:
        """How the request ended."""
        if self.ended is None:
            return "running"
        if self.timed_out is not None:
            return "timeout"
        if self.disconnected and not self.damaged:  # fault injection closes connections itself
            return "gone"
        if self.failed or (self.status or 0) >= 400:
            return "error"
        return "complete" if self.response_complete and not self.damaged else "truncated"
