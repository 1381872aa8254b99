"""Failures as OpenAI's API tells them: a status, and a body that says what and where."""

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
from elastic_moe.server.middleware.rate_limits import retry_after

_log = logging.getLogger("elastic_moe.server")
INVALID = "invalid_request_error"
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with a status other than 200."""

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
        """What the client gets."""
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
        """The whole answer."""
        # ASCII: a message may quote what is no valid Unicode.
        content = json.dumps(self.body()).encode()
        return Response(content, self.status, self.headers, "application/json")


def as_api_error(error: BaseException, *, param: str | None = None, status: int = 400) -> ApiError:
    """What a failure means to the client.

    Args:
        param: the part of the request that a bad prompt is in.
        status: where a profile does not exist.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
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
    """Log a fault of ours: where it was, without its message, which may quote a prompt."""
    _log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


async def tell_failure(request: Request, error: Exception) -> Response:
    """Exception handler: anything that an endpoint raises."""
    told = as_api_error(error)
    if isinstance(error, QueueFullError):
        service = request.app.state.service
        told.headers["retry-after"] = str(retry_after(service.engine, service.metrics))
    return told.response()


async def tell_http(request: Request, error: Exception) -> Response:
    """Exception handler: no such path or method, or a body that is no JSON."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # raised while the body was read
        return error.__cause__.response()
    headers = error.headers
    if error.status_code == 405:
        headers = {"allow": ", ".join(_methods(request))}
    return ApiError(error.status_code, str(error.detail), headers=headers).response()


def _methods(request: Request) -> list[str]:
    """What a path may be asked with: each method has a route of its own."""
    fitting = [
        route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE
    ]
    return sorted({method for route in fitting for method in route.methods})


async def tell_invalid(_: Request, error: Exception) -> Response:
    """Exception handler: a body that breaks its schema. All its faults are told."""
    assert isinstance(error, RequestValidationError)
    faults = [(_where(fault, error.body), fault) for fault in error.errors()]
    told = dict.fromkeys(_explain(*fault) for fault in faults)  # branches of a choice repeat
    return ApiError(400, " ".join(told), param=faults[0][0] or None).response()


def _where(fault: Mapping[str, Any], body: Any) -> str:
    """Such as messages.0.role: the keys of the body, without the types that pydantic tried."""
    parts: list[str | int] = []
    for part in fault["loc"][1:]:
        inside = part in body if isinstance(body, Mapping) else _is_index(part, body)
        if inside:
            body = body[part]
        elif fault["type"] != "missing" or part != fault["loc"][-1]:
            continue
        parts.append(part)
    return ".".join(map(str, parts))


def _is_index(part: object, body: object) -> bool:
    return isinstance(body, list) and isinstance(part, int) and part < len(body)


def _explain(where: str, fault: Mapping[str, Any]) -> str:
    where = where or "body"
    if fault["type"] == "extra_forbidden":
        return f"unknown key {shorten(where)}."
    if fault["type"] == "json_invalid":
        return f"the body is no JSON: {fault['ctx']['error']}."
    if fault["type"] == "missing":
        return f"{where} is missing."
    return f"{where}: {fault['msg']}, got {shorten(fault['input'])}."
