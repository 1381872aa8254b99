"""What came to the server, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

SHOWN = 20  # of a report


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request below /v1/.

    Attributes:
        number: from 1, in the order in which they came to this server.
        body: its JSON; None if it has none.
        stream: whether the body asks for one.
        status: of the answer; None before there is one.
        injected: what was done to it on purpose, such as {'error': 429}; None for nothing.
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
    body: Any
    stream: bool
    status: int | None
    injected: Mapping[str, Any] | None
    outcome: Literal["complete", "error", "truncated", "gone", "running"]
    text: str | None
    begun_seconds: float
    ended_seconds: float | None

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """From the server's JSON."""
        return cls(**{field.name: told[field.name] for field in fields(cls)})

    def line(self) -> str:
        """It in a line, without its texts."""
        parts = [f"#{self.number} {self.method} {self.path}"]
        parts += ["stream"] * self.stream
        parts.append(f"-> {self.status or 'no status'}, {self.outcome}")
        if self.ended_seconds is not None:
            parts.append(f"after {self.ended_seconds - self.begun_seconds:.3f} s")
        if self.injected is not None:
            told = ", ".join(f"{k} {_short(v)}" for k, v in self.injected.items())
            parts.append(f"(injected: {told})")
        return " ".join(parts)


def report(records: Sequence[RequestRecord], shown: int = SHOWN) -> str:
    """A line for each; of many, the first and the last."""
    lines = [record.line() for record in records]
    if len(lines) > shown:
        half = shown // 2
        lines[half:-half] = [f"... {len(lines) - 2 * half} more"]
    return "\n".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
