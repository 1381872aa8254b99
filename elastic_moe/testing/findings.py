"""Faults of a client under test, and the error that reports them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_moe.testing.records import RequestRecord, report

NOT_RETRIED = "it does not retry what is retryable"
RETRIED = "it retries what is not retryable"
RETRY_AFTER = "it ignores Retry-After"
TRUNCATED = "it takes a truncated answer for a whole one"
SWALLOWED = "it returns though it got no answer"
ENDLESS = "it does not give up"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of a client in one scenario.

    Attributes:
        fault: one of those above.
        scenario: what the server did, in words.
        seen: what the client did, in words.
        records: the client's requests.
    """

    fault: str
    scenario: str
    seen: str
    records: tuple[RequestRecord, ...]

    def __str__(self) -> str:
        return f"{self.scenario}: {self.seen}\n{textwrap.indent(report(self.records, 6), '  ')}"


class NotResilientError(AssertionError):
    """A client mishandles faults.

    Attributes:
        findings: every fault in every scenario.
        faults: the kinds of these, in order.
    """

    def __init__(self, findings: Sequence[Finding], not_tried: Sequence[str] = ()) -> None:
        self.findings = tuple(findings)
        self.faults = tuple(dict.fromkeys(finding.fault for finding in findings))
        lines = ["the client is not resilient:"]
        for fault in self.faults:
            lines.append(f"* {fault}")
            own = (str(found) for found in self.findings if found.fault == fault)
            lines += [textwrap.indent(finding, "    ") for finding in own]
        if not_tried:
            lines.append(f"not tried, as it was still busy: {', '.join(not_tried)}")
        super().__init__("\n".join(lines))
