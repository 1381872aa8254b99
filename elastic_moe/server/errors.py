"""Errors as OpenAI's API sends them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from elastic_moe.errors import (
    ContextLengthError,
    EngineError,
    PreconditionError,
    ProfileError,
    ProfileNotFoundError,
    ProfilesFileError,
    QueueFullError,
    RequestError,
    RoutingError,
)
from elastic_moe.routing import shorten
from elastic_moe.server.middleware.rate_limits import retry_after_seconds

_log = logging.getLogger("elastic_moe.server")
INVALID = "invalid_request_error"
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request fails with this status and message.

    Attributes:
        param: the part of the request at fault, such as "messages.0.role".
        code: for programs, such as "model_not_found".
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body, without the status."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, INVALID)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The HTTP response."""
        # ASCII: a message may quote what is not valid Unicode.
        content = json.dumps(self.body()).encode()
        return Response(content, self.status, self.headers, "application/json")


def as_api_error(error: BaseException, *, status: int = 400) -> ApiError:
    """Any failure as an `ApiError`; one that is not the client's fault becomes a 500.

    Args:
        status: of a profile that does not exist.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, RoutingError):
        return ApiError(400, str(error), param="routing_config", code="invalid_routing")
    if isinstance(error, ProfileNotFoundError):
        return ApiError(status, str(error), param="profile", code="profile_not_found")
    if isinstance(error, ProfilesFileError):
        return ApiError(409, str(error), code="no_profiles_file")
    if isinstance(error, ProfileError):
        return ApiError(400, str(error), param="name")
    if isinstance(error, PreconditionError):
        return ApiError(412, str(error), code="precondition_failed")
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_unavailable")
    return ApiError(500, f"{type(error).__name__}; the server's log says more.")


def log_failure(error: BaseException) -> None:
    """Log an internal error: its traceback without its message, which may quote a prompt."""
    _log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


async def handle_failure(request: Request, error: Exception) -> Response:
    """Exception handler of `ApiError` and `ElasticMoEError`."""
    answer = as_api_error(error)
    if isinstance(error, QueueFullError):
        service = request.app.state.service
        seconds = retry_after_seconds(service.engine, service.metrics)
        answer.headers["retry-after"] = str(seconds)
    return answer.response()


async def handle_http_error(request: Request, error: Exception) -> Response:
    """Exception handler of Starlette's errors: unknown path or method, unreadable body."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # raised while the body was read
        return error.__cause__.response()
    headers = error.headers
    if error.status_code == 405:
        headers = {"allow": ", ".join(_allowed_methods(request))}
    return ApiError(error.status_code, str(error.detail), headers=headers).response()


def _allowed_methods(request: Request) -> list[str]:
    """Methods of a path; each is a route of its own, so Starlette knows only the first."""
    matching = [
        route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE
    ]
    return sorted({method for route in matching for method in route.methods})


async def handle_invalid_body(_: Request, error: Exception) -> Response:
    """Exception handler of a body that breaks its schema; the message lists all its errors."""
    assert isinstance(error, RequestValidationError)
    details = [(_location(detail, error.body), detail) for detail in error.errors()]
    # Branches of a union repeat each other.
    messages = dict.fromkeys(_message(*detail) for detail in details)
    return ApiError(400, " ".join(messages), param=details[0][0] or None).response()


def _location(detail: Mapping[str, Any], body: Any) -> str:
    """Such as "messages.0.role": keys of the body, without the union members in pydantic's loc."""
    parts: list[str | int] = []
    for part in detail["loc"][1:]:
        inside = part in body if isinstance(body, Mapping) else _is_index(part, body)
        if inside:
            body = body[part]
        elif detail["type"] != "missing" or part != detail["loc"][-1]:
            continue
        parts.append(part)
    return ".".join(map(str, parts))


def _is_index(part: object, body: object) -> bool:
    return isinstance(body, list) and isinstance(part, int) and part < len(body)


def _message(where: str, detail: Mapping[str, Any]) -> str:
    where = where or "body"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {shorten(where)}."
    if detail["type"] == "json_invalid":
        return f"the body is no JSON: {detail['ctx']['error']}."
    if detail["type"] == "missing":
        return f"{where} is missing."
    return f"{where}: {detail['msg']}, got {shorten(detail['input'])}."
