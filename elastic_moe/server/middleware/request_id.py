"""Request ids: the client's own X-Request-ID, else a new one."""

from __future__ import annotations

import re
import uuid

_VALID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(headers: dict[bytes, bytes]) -> str:
    """The client's X-Request-ID if it is 1 to 128 printable ASCII characters, else a new id."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _VALID.fullmatch(given) else uuid.uuid4().hex
