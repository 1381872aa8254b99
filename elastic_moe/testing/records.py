"""The requests that a server received, as /admin/requests reports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

SHOWN = 20  # lines of a report


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request below /v1/.

    Attributes:
        number: from 1, in order of arrival.
        body: parsed JSON; None if it is not JSON, or too long.
        stream: whether the body asks for one.
        status: of the response; None before it starts.
        injected: injected faults, such as {'error': 429}; None for none.
        outcome: complete: the whole response was sent; error: a status from 400, or an error in
            mid-stream; truncated: fault injection cut or corrupted it; gone: the client closed the
            connection early; running: not ended yet.
        text: text of the first choice, as far as it was sent.
        begun_seconds, ended_seconds: since the server started.
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
    def of(cls, body: Mapping[str, Any]) -> Self:
        """A record from the server's JSON."""
        return cls(**{field.name: body[field.name] for field in fields(cls)})

    def line(self) -> str:
        """A line about the request, without its texts."""
        parts = [f"#{self.number} {self.method} {self.path}"]
        parts += ["stream"] * self.stream
        parts.append(f"-> {self.status or 'no status'}, {self.outcome}")
        if self.ended_seconds is not None:
            parts.append(f"after {self.ended_seconds - self.begun_seconds:.3f} s")
        if self.injected is not None:
            effects = ", ".join(f"{k} {_short(v)}" for k, v in self.injected.items())
            parts.append(f"(injected: {effects})")
        return " ".join(parts)


def report(records: Sequence[RequestRecord], shown: int = SHOWN) -> str:
    """A line per request; of more than `shown`, the first and the last."""
    lines = [record.line() for record in records]
    if len(lines) > shown:
        half = shown // 2
        lines[half:-half] = [f"... {len(lines) - 2 * half} more"]
    return "\n".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
