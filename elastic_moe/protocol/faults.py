"""/admin/faults: what goes wrong on purpose, and how often."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from elastic_moe.protocol.base import Answer, Body, Count

Milliseconds = Annotated[float, Field(ge=0, le=3_600_000)]
Span = Milliseconds | Annotated[list[Milliseconds], Field(min_length=2, max_length=2)]
_CUTS = ("drop_after", "malformed_after", "stall_after")
_WITH_ERROR = {"error", "retry_after", "latency_ms"}


class Effects(Body):
    """What happens to a request.

    A time in milliseconds may be [least, most]: it is drawn evenly between them.

    Attributes:
        error: this status in place of an answer.
        retry_after: seconds, in the error's Retry-After.
        latency_ms: passes before anything else happens.
        ttft_ms: nothing of the answer goes out before so long after the request came.
        itl_ms: passes between two events of a stream.
        drop_after: the connection closes after so many events; 0: before the answer begins. An
            answer that is no stream breaks off halfway.
        malformed_after: the event after so many is cut in its middle, and the stream goes on. An
            answer that is no stream is cut in its middle.
        stall_after: nothing comes after so many events. An answer that is no stream stops halfway.
        routing_jitter: depth and top-k shrink by up to this fraction, drawn for each request; the
            answer tells what ran.
        force_text: the answer's text, token by token with the model's own log-probabilities.
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
        """Names of the effects that are asked for."""
        return {name for name in Effects.model_fields if getattr(self, name) is not None}


class FaultRule(Effects):
    """Which requests something happens to.

    A rule numbers the requests to its path from 1. It strikes those of them that pass all of the
    following; a request is struck by the first rule that strikes it.

    Attributes:
        path: such as /v1/chat/completions; absent, every path below /v1/.
        rate: the share of requests, drawn by the plan's seed and the request's number.
        count: so many times at most.
        skip: not the first so many.
        at: these numbers alone.
        after_seconds, until_seconds: in this span, counted from when the plan was set.
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
    """All that goes wrong on purpose.

    Attributes:
        seed: of what is drawn; the same requests in the same order meet the same faults.
        preset: 'remote': a round trip of 200 to 400 ms for every request, beside what rules do.
    """

    seed: Count = 0
    preset: Literal["remote"] | None = None
    rules: list[FaultRule] = Field(default_factory=list, max_length=1000)


class RuleCount(Answer):
    """What a rule has done.

    Attributes:
        matched: requests to its path since the plan was set.
        injected: those of them that it struck.
    """

    matched: int
    injected: int


class FaultState(Answer):
    """The plan, and what each of its rules has done."""

    plan: FaultPlan
    counts: list[RuleCount]


class RequestRecord(Answer):
    """A request that came, for who tests its client.

    Attributes:
        number: from 1, in the order in which they came.
        body: its JSON, unless it is none or has more than 1 MiB.
        stream: whether the body asks for one.
        status: of the answer; null before there is one.
        injected: what was done to it.
        outcome: complete: the whole answer went out; error: a status from 400, or an error in
            mid-stream; truncated: it was cut or spoilt on purpose; gone: the client closed before
            the end; running: none of these yet.
        text: of the answer's first choice, as far as it went out.
        begun_seconds, ended_seconds: since the server began.
    """

    number: int
    request_id: str
    method: str
    path: str
    body: object
    stream: bool
    status: int | None
    injected: dict[str, object] | None
    outcome: Literal["complete", "error", "truncated", "gone", "running"]
    text: str | None
    begun_seconds: float
    ended_seconds: float | None


class RequestRecords(Answer):
    """Requests to paths below /v1/.

    Attributes:
        dropped: older ones that are no longer kept.
    """

    requests: list[RequestRecord]
    dropped: int
