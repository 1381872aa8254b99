"""/admin/requests: the requests that a server received, for tests of clients."""

from __future__ import annotations

from typing import Literal

from elastic_moe.protocol.base import Answer


class RequestRecord(Answer):
    """One request below /v1/.

    Attributes:
        number: from 1, in order of arrival.
        body: parsed JSON; null if it is not JSON, or longer than 1 MiB.
        stream: whether the body asks for a stream.
        status: of the response; null before it starts.
        injected: effects of fault injection, such as {"error": 429}; null for none.
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
    body: object
    stream: bool
    status: int | None
    injected: dict[str, object] | None
    outcome: Literal["complete", "error", "truncated", "gone", "running"]
    text: str | None
    begun_seconds: float
    ended_seconds: float | None


class RequestRecords(Answer):
    """Requests below /v1/, oldest first.

    Attributes:
        dropped: number of older requests that are no longer kept.
    """

    requests: list[RequestRecord]
    dropped: int
