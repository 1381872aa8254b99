"""ETags: so that two who change one thing do not undo each other's work."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel

from elastic_moe.errors import PreconditionError


def etag(value: BaseModel) -> str:
    """Of what a value says, with its quotes: equal for equal values."""
    return f'"{hashlib.sha256(value.model_dump_json().encode()).hexdigest()[:32]}"'


def check_match(current: str | None, if_match: str | None, if_none_match: str | None) -> None:
    """Raise `PreconditionError` if a change was meant for another state.

    Args:
        current: the ETag of what there is; None if there is nothing.
        if_match: change only this state; '*': only what is there.
        if_none_match: not None: only make what is not there.
    """
    if if_none_match is not None and current is not None:
        raise _changed(f"it exists, with ETag {current}")
    if if_match is None:
        return
    wanted = {tag.strip() for tag in if_match.split(",")}
    if current is None:
        raise _changed("it does not exist")
    if not wanted & {"*", current}:
        raise _changed(f"its ETag is {current}")


def _changed(state: str) -> PreconditionError:
    return PreconditionError(f"nothing was changed: {state}.")
