"""`assert_resilient`: tests how a client handles the faults of a remote API."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from elastic_moe.testing import findings
from elastic_moe.testing.caller import Caller, End, Raised, Returned
from elastic_moe.testing.faults import Rule
from elastic_moe.testing.findings import Finding, NotResilientError
from elastic_moe.testing.records import RequestRecord, report
from elastic_moe.testing.server import ElasticMoEServer

CLOCK_SECONDS = 0.02  # tolerance for a client's clock
LEAVE_SECONDS = 5.0  # for a call to end once no faults are injected
SETTLE_SECONDS = 10.0  # for the server to end requests that a client abandoned


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the server does, and what a client should do.

    Attributes:
        description: the rule in words; "{answer}" is "stream" or "answer".
        expected: retry: try again and return an answer; raise: at once; whole: raise, or try again
            and return a whole answer; give up: raise, after a few tries at most.
    """

    name: str
    description: str
    rule: Rule
    expected: Literal["retry", "raise", "whole", "give up"]


def scenarios(*, retry_after_seconds: float = 1.0, max_attempts: int = 10) -> dict[str, Scenario]:
    """All of them, by name."""
    rate_limit = Rule(error=429, count=1, retry_after=retry_after_seconds)
    description = f"429 with Retry-After: {retry_after_seconds:g}, once"
    found = [
        Scenario("429", description, rate_limit, "retry"),
        Scenario("500", "500, once", Rule(error=500, count=1), "retry"),
        Scenario("503", "503, once", Rule(error=503, count=1), "retry"),
        Scenario(
            "dropped",
            "the connection closes before the {answer}, once",
            Rule(drop_after=0, count=1),
            "retry",
        ),
        *(
            Scenario(str(status), f"{status}", Rule(error=status), "raise")
            for status in (400, 401, 404, 422)
        ),
        Scenario("cut", "the {answer} breaks off, once", Rule(drop_after=1, count=1), "whole"),
        Scenario(
            "malformed",
            "a part of the {answer} is missing, once",
            Rule(malformed_after=1, count=1),
            "whole",
        ),
        Scenario("lasting", "503, again and again", Rule(error=503, count=max_attempts), "give up"),
    ]
    return {scenario.name: scenario for scenario in found}


def assert_resilient(
    server: ElasticMoEServer,
    call: Callable[[], Any],
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    path: str | None = None,
    retry_after_seconds: float = 1.0,
    max_attempts: int = 10,
    max_seconds: float = 30.0,
) -> None:
    """Fail if a client mishandles what a remote API may do to it.

    The client must, and answers may be streams or not:

    - try again after 429, 500, 503 and a connection that closes, and wait as Retry-After says;
    - raise on 400, 401, 404 and 422, without another request;
    - not return a cut or corrupted answer ("cut", "malformed"): raise, or try again;
    - give up and raise when an error lasts ("lasting").

    Args:
        server: called by `call`. Its fault plan is replaced meanwhile.
        call: makes one request with the client under test and returns the answer, or raises; sync
            or async. It runs in a thread of its own, a dozen times.
        only, without: names of scenarios to try, or to leave out; see `scenarios`.
        path: of the request, where `call` makes others beside it; None if it makes just one.
        retry_after_seconds: of the Retry-After header; HTTP knows whole seconds only.
        max_attempts: requests after which the client has not given up.
        max_seconds: for a single call.

    Raises:
        NotResilientError: an AssertionError that lists every fault and the requests made.
        AssertionError: `call` fails even without faults.
        ValueError: there is no such scenario.
    """
    every = scenarios(retry_after_seconds=retry_after_seconds, max_attempts=max_attempts)
    unknown = sorted({*(only or ()), *without} - every.keys())
    if unknown:
        raise ValueError(
            f"there is no scenario {', '.join(map(repr, unknown))}; there are {', '.join(every)}."
        )
    chosen = [s for n, s in every.items() if (only is None or n in only) and n not in without]
    before = server.faults.plan
    caller = Caller(call)
    trial = _Trial(server, caller, path, max_seconds)
    try:
        trial.without_faults()
        found: list[Finding] = []
        while chosen and not caller.busy:
            found += trial.of(chosen.pop(0))
        if found:
            raise NotResilientError(found, [scenario.name for scenario in chosen])
    finally:
        caller.close()
        server.faults.set(before)


class _Trial:
    """One client under test."""

    def __init__(
        self, server: ElasticMoEServer, caller: Caller, path: str | None, max_seconds: float
    ) -> None:
        self._server, self._caller, self._max_seconds = server, caller, max_seconds
        self._path, self._answer = path, "answer"

    def without_faults(self) -> None:
        """Check that `call` works without faults, and learn its path.

        Raises:
            AssertionError: it does not work.
        """
        self._server.faults.clear()
        end, records = self._call()
        message = f"nothing was wrong, but call() {end or 'did not end'}.\n{report(records)}"
        if isinstance(end, Raised):
            raise AssertionError(message) from end.error
        if end is None:
            raise AssertionError(message)
        if len(records) != 1:
            where = "this server" if self._path is None else self._path
            raise AssertionError(
                f"call() must make one request to {where}, it made {len(records)}. If it makes "
                f"others on purpose, name the path of the one to test: path='/v1/...'.\n"
                f"{report(records)}"
            )
        self._path = records[0].path
        self._answer = "stream" if records[0].stream else "answer"

    def of(self, scenario: Scenario) -> Iterator[Finding]:
        """What the client does wrong in a scenario."""
        self._server.faults.set({"rules": [{**scenario.rule, "path": self._path}]})
        end, records = self._call()
        description = scenario.description.format(answer=self._answer)
        for fault, seen in _judge(scenario, end, records, self._max_seconds):
            yield Finding(fault, description, seen, tuple(records))

    def _call(self) -> tuple[End | None, list[RequestRecord]]:
        """How a call ended (None: not in time), and its requests."""
        number = self._server.last_number()
        self._caller.start()
        end = self._caller.end(self._max_seconds)
        records = self._server.requests_after(number)
        if end is None:  # it may end once it is answered
            self._server.faults.clear()
            self._caller.end(LEAVE_SECONDS)
        else:
            records = self._server.settled(number, seconds=SETTLE_SECONDS)
        return end, [r for r in records if self._path in (None, r.path)]


def _judge(
    scenario: Scenario, end: End | None, records: list[RequestRecord], max_seconds: float
) -> Iterator[tuple[str, str]]:
    """Faults, and what the client did."""
    count = f"{len(records)} request{'s' * (len(records) != 1)}"
    if end is None:
        retried = scenario.expected == "raise" and len(records) > 1
        fault = findings.RETRIED if retried else findings.ENDLESS
        yield fault, f"did not end within {max_seconds:g} s, in {count}"
        return
    seen = f"{end} after {count}"
    outcome = records[-1].outcome if records else "error"
    if scenario.expected == "give up" and isinstance(end, Returned) and outcome == "complete":
        yield findings.ENDLESS, f"had not given up after {len(records) - 1} requests"
    if scenario.expected == "raise" and len(records) > 1:
        yield findings.RETRIED, seen
    if scenario.expected == "retry":
        if isinstance(end, Raised):
            yield findings.NOT_RETRIED, seen
        yield from _waited(scenario, records)
    if isinstance(end, Returned) and outcome == "truncated":
        yield findings.TRUNCATED, f"{seen}, the last of them cut or spoilt"
    if isinstance(end, Returned) and outcome == "error":
        yield findings.SWALLOWED, seen


def _waited(scenario: Scenario, records: list[RequestRecord]) -> Iterator[tuple[str, str]]:
    wanted = scenario.rule.get("retry_after")
    if wanted is None or len(records) < 2 or records[0].ended_seconds is None:
        return
    waited = records[1].begun_seconds - records[0].ended_seconds
    if waited < wanted - CLOCK_SECONDS:
        yield findings.RETRY_AFTER, f"waited {waited:.2f} s before the next request"
