"""ETags and If-Match: a change fails with 412 if somebody else made one in between."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel

from elastic_moe.errors import PreconditionError


def etag(value: BaseModel) -> str:
    """The ETag of a value, quotes included; equal for equal values."""
    return f'"{hashlib.sha256(value.model_dump_json().encode()).hexdigest()[:32]}"'


def check_match(current: str | None, if_match: str | None, if_none_match: str | None) -> None:
    """Raise `PreconditionError` (412) unless the preconditions hold.

    Args:
        current: ETag of the stored value; None if there is none.
        if_match: ETags to change only; '*' for any that exists.
        if_none_match: anything but None to create only.
    """
    if if_none_match is not None and current is not None:
        raise _precondition_failed(f"it exists, with ETag {current}")
    if if_match is None:
        return
    wanted = {tag.strip() for tag in if_match.split(",")}
    if current is None:
        raise _precondition_failed("it does not exist")
    if not wanted & {"*", current}:
        raise _precondition_failed(f"its ETag is {current}")


def _precondition_failed(state: str) -> PreconditionError:
    return PreconditionError(f"nothing was changed: {state}.")
