"""/admin/faults: fault injection."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from elastic_moe.protocol.base import Answer, Body, Count

Milliseconds = Annotated[float, Field(ge=0, le=3_600_000)]
Span = Milliseconds | Annotated[list[Milliseconds], Field(min_length=2, max_length=2)]
_CUTS = ("drop_after", "malformed_after", "stall_after")
_WITH_ERROR = {"error", "retry_after", "latency_ms"}


class Effects(Body):
    """Faults of one request.

    A time in milliseconds may be [min, max]; it is drawn uniformly.

    Attributes:
        error: answer with this status.
        retry_after: seconds; Retry-After header of the error.
        latency_ms: delay before the request is processed.
        ttft_ms: delay of the first byte, counted from the arrival of the request.
        itl_ms: delay between two events of a stream.
        drop_after: close the connection after so many events; 0: before the response starts. An
            answer that is not streamed breaks off halfway.
        malformed_after: cut the next event in half after so many, and go on. An answer that is not
            streamed is cut in half.
        stall_after: send nothing after so many events. An answer that is not streamed stops
            halfway.
        routing_jitter: reduce depth and top-k by up to this fraction, drawn for each request; the
            answer's `routing` says what ran.
        force_text: text of the answer, token by token with the model's own log-probabilities.
    """

    error: Annotated[int, Field(ge=400, le=599)] | None = None
    retry_after: Annotated[float, Field(ge=0, le=86_400)] | None = None
    latency_ms: Span | None = None
    ttft_ms: Span | None = None
    itl_ms: Span | None = None
    drop_after: Count | None = None
    malformed_after: Count | None = None
    stall_after: Count | None = None
    routing_jitter: Annotated[float, Field(gt=0, le=1)] | None = None
    force_text: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("latency_ms", "ttft_ms", "itl_ms")
    @classmethod
    def _ascending(cls, value: float | list[float] | None) -> float | list[float] | None:
        if isinstance(value, list) and value[0] > value[1]:
            raise ValueError("must be [least, most]")
        return value

    @model_validator(mode="after")
    def _together(self) -> Effects:
        given = self.given()
        if self.retry_after is not None and self.error is None:
            raise ValueError("retry_after needs error, whose header it is")
        if self.error is not None and given - _WITH_ERROR:
            raise ValueError(f"error leaves no room for {', '.join(sorted(given - _WITH_ERROR))}")
        cuts = [name for name in _CUTS if name in given]
        if len(cuts) > 1:
            raise ValueError(f"{' and '.join(cuts)} are both given; keep one of them")
        return self

    def given(self) -> set[str]:
        """Names of the effects that are set."""
        return {name for name in Effects.model_fields if getattr(self, name) is not None}


class FaultRule(Effects):
    """Faults, and the requests that get them.

    A rule numbers the requests to its path from 1. It applies to those that meet all conditions; a
    request gets the faults of the first rule that applies.

    Attributes:
        path: such as /v1/chat/completions; absent: every path below /v1/.
        rate: share of requests, drawn by the plan's seed and the request's number.
        count: apply at most so many times.
        skip: not to the first so many.
        at: to these numbers only.
        after_seconds, until_seconds: in this period, counted from when the plan was set.
    """

    path: Annotated[str, Field(pattern="^/v1/")] | None = None
    rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    count: Count | None = None
    skip: Count = 0
    at: list[Annotated[int, Field(ge=1)]] | None = None
    after_seconds: Annotated[float, Field(ge=0)] = 0.0
    until_seconds: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _does_something(self) -> FaultRule:
        if not self.given():
            raise ValueError("a rule must have an effect, such as error or latency_ms")
        return self


class FaultPlan(Body):
    """All rules of fault injection.

    Attributes:
        seed: of rates and spans: the same requests in the same order get the same faults.
        preset: 'remote': 200 to 400 ms latency for every request, besides the rules.
    """

    seed: Count = 0
    preset: Literal["remote"] | None = None
    rules: list[FaultRule] = Field(default_factory=list, max_length=1000)


class RuleCount(Answer):
    """Counts of one rule since the plan was set.

    Attributes:
        matched: requests to its path.
        injected: requests that it applied to.
    """

    matched: int
    injected: int


class FaultState(Answer):
    """The plan, and the counts of its rules in order."""

    plan: FaultPlan
    counts: list[RuleCount]
