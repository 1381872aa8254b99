"""What one HTTP request comes to: kept while it runs, for metrics and the log at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from elastic_moe.engine.outputs import Completion

ACCOUNT = "elastic_moe.account"  # of a scope
OTHER = "other"
Outcome = Literal["complete", "error", "timeout", "gone", "truncated"]


@dataclass(slots=True)
class Account:
    """One request, in its server's own words: nothing of its text, headers or query.

    Attributes:
        path: as it was asked for.
        endpoint: the path that it is served under, such as /v1/models/{model}.
        begun: when its head had come, on the clock of time.perf_counter.
        seconds: that it took, once it has ended.
        status: of its answer; None before that begins, or if it never did.
        subnet: the name of its sub-network, once that is decided.
        completions: what the engine has finished for it, one for every prompt.
        whole: whether all of its answer was sent.
        failed: whether something went wrong after its answer had begun.
        gone: whether the client went before the end.
        late: what took longer than it may: the client's body, or the request itself.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    endpoint: str = OTHER
    begun: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    status: int | None = None
    subnet: str | None = None
    completions: list[Completion] = field(default_factory=list)
    whole: bool = False
    failed: bool = False
    gone: bool = False
    late: Literal["read", "request"] | None = None

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        if self.late is not None:
            return "timeout"
        if self.gone:
            return "gone"
        if self.failed or (self.status or 0) >= 400:
            return "error"
        return "complete" if self.whole else "truncated"
