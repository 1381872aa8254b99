"""What came in and what became of it: for who tests a client against this server."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic_moe.protocol.faults import RequestRecord

MAX_RECORDS = 10_000
MAX_BYTES = 1 << 20  # of a body, and of an answer
Outcome = Literal["complete", "error", "truncated", "gone", "running"]


@dataclass(slots=True)
class Entry:
    """One request, while it runs and after.

    Attributes:
        body: as it came; empty if it is too long to keep.
        sent: the answer as it went out, up to `MAX_BYTES`.
        spoilt: whether it was cut or spoilt on purpose.
    """

    number: int
    request_id: str
    method: str
    path: str
    begun_seconds: float
    body: bytes = b""
    status: int | None = None
    injected: dict[str, object] | None = None
    outcome: Outcome = "running"
    ended_seconds: float | None = None
    sent: bytearray = field(default_factory=bytearray)
    spoilt: bool = False

    def told(self) -> RequestRecord:
        """As it goes over the wire. Reading bodies is left to who asks."""
        try:
            body = json.loads(self.body)
        except ValueError:
            body = None
        return RequestRecord(
            number=self.number,
            request_id=self.request_id,
            method=self.method,
            path=self.path,
            body=body,
            stream=isinstance(body, dict) and body.get("stream") is True,
            status=self.status,
            injected=self.injected,
            outcome=self.outcome,
            text=_text(bytes(self.sent)),
            begun_seconds=self.begun_seconds,
            ended_seconds=self.ended_seconds,
        )


class RequestLog:
    """The last `MAX_RECORDS` requests."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=MAX_RECORDS)
        self._number = self._cleared = 0
        self._start = time.monotonic()

    @property
    def dropped(self) -> int:
        """How many are no longer kept, of those since the last `clear`."""
        return self._number - self._cleared - len(self._entries)

    def begin(self, request_id: str, method: str, path: str) -> Entry:
        """Note a request that has come."""
        self._number += 1
        entry = Entry(self._number, request_id, method, path, self.seconds())
        self._entries.append(entry)
        return entry

    def end(self, entry: Entry, outcome: Outcome) -> None:
        """Note what became of it; only the first word counts."""
        if entry.outcome == "running":
            entry.outcome, entry.ended_seconds = outcome, self.seconds()

    def since(self, number: int) -> list[Entry]:
        """Those after this number."""
        return [entry for entry in self._entries if entry.number > number]

    def clear(self) -> None:
        """Forget them. Numbers go on."""
        self._entries.clear()
        self._cleared = self._number

    def seconds(self) -> float:
        """Since the server began."""
        return round(time.monotonic() - self._start, 6)


def _text(sent: bytes) -> str | None:
    """The text of an answer's first choice, as far as it is there."""
    texts = []
    for line in sent.split(b"\n"):
        data = line.removeprefix(b"data: ").strip()
        try:
            found = _first_text(json.loads(data))
        except ValueError:
            continue  # [DONE], or what was cut on purpose
        if found is not None:
            texts.append(found)
    return "".join(texts) if texts else None


def _first_text(body: Any) -> str | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not choices or choices[0].get("index") != 0:
        return None
    choice = choices[0]
    text = (choice.get("delta") or choice.get("message") or {}).get("content", choice.get("text"))
    return text if isinstance(text, str) else None
