"""The last requests, for GET /admin/requests. Kept under --inject alone."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

from elastic_moe.protocol.admin.requests import RequestRecord
from elastic_moe.server.observe.access_record import AccessRecord

MAX_RECORDS = 10_000


class RequestHistory:
    """The last `MAX_RECORDS` requests, numbered from 1."""

    def __init__(self) -> None:
        self._records: deque[AccessRecord] = deque(maxlen=MAX_RECORDS)
        self._last_number = self._last_cleared = 0
        self._start = time.perf_counter()

    @property
    def dropped(self) -> int:
        """Number of requests since the last `clear` that are no longer kept."""
        return self._last_number - self._last_cleared - len(self._records)

    def add(self, record: AccessRecord) -> None:
        """Number a request and keep it; from now on its response is kept too."""
        self._last_number += 1
        record.number, record.response_body = self._last_number, bytearray()
        self._records.append(record)

    def after(self, number: int) -> list[RequestRecord]:
        """Requests with a higher number, in the form of the wire."""
        return [self._to_wire(record) for record in self._records if record.number > number]

    def clear(self) -> None:
        """Drop all requests. Numbers continue."""
        self._records.clear()
        self._last_cleared = self._last_number

    def _to_wire(self, record: AccessRecord) -> RequestRecord:
        try:
            body = json.loads(record.request_body)
            json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError):  # no JSON, or text that UTF-8 cannot say
            body = None
        outcome = record.outcome
        return RequestRecord(
            number=record.number,
            request_id=record.request_id,
            method=record.method,
            path=record.path,
            body=body,
            stream=isinstance(body, dict) and body.get("stream") is True,
            status=record.status,
            injected=record.injected,
            outcome="error" if outcome == "timeout" else outcome,
            text=_answer_text(bytes(record.response_body or b"")),
            begun_seconds=self._seconds(record.started),
            ended_seconds=None if record.ended is None else self._seconds(record.ended),
        )

    def _seconds(self, clock: float) -> float:
        """Seconds since the server started."""
        return round(clock - self._start, 6)


def _answer_text(response: bytes) -> str | None:
    """Text of the first choice, as far as it was sent; None if there is none."""
    texts = []
    for line in response.split(b"\n"):
        try:
            text = _first_choice_text(json.loads(line.removeprefix(b"data: ").strip()))
        except ValueError:
            continue  # [DONE], or an event that fault injection cut
        if text is not None:
            texts.append(text)
    return "".join(texts) if texts else None


def _first_choice_text(body: Any) -> str | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not choices or choices[0].get("index") != 0:
        return None
    choice = choices[0]
    text = (choice.get("delta") or choice.get("message") or {}).get("content", choice.get("text"))
    return text if isinstance(text, str) else None
