"""Errors, as OpenAI's API has them."""

from __future__ import annotations

from elastic_moe.protocol.base import Answer


class Error(Answer):
    """What went wrong.

    Attributes:
        param: the part of the request at fault, such as "messages.0.role".
        code: for programs, such as "model_not_found".
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Answer):
    """The body of every unsuccessful response."""

    error: Error
