"""The application: its endpoints, its middlewares, and its handlers of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from elastic_moe import __version__
from elastic_moe.engine import Engine
from elastic_moe.errors import ElasticMoEError
from elastic_moe.protocol.errors import ErrorResponse
from elastic_moe.server import errors
from elastic_moe.server.api import (
    admin,
    chat,
    completions,
    embeddings,
    health,
    metrics,
    models,
    tokenize,
)
from elastic_moe.server.api.generation import generating_paths
from elastic_moe.server.disconnect import ClientDisconnected
from elastic_moe.server.middleware.access_log import AccessLog
from elastic_moe.server.middleware.auth import Authentication
from elastic_moe.server.middleware.body_limit import BodyLimit
from elastic_moe.server.middleware.fault_injection import FaultInjection
from elastic_moe.server.middleware.timeouts import Timeouts
from elastic_moe.server.service import Service
from elastic_moe.server.settings import ServerSettings

_ERROR_DESCRIPTIONS = {
    400: "the request is invalid",
    401: "an API key is needed",
    404: "there is no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    429: "too many requests are unfinished",
    503: "the server is shutting down, or lacks something that the request needs",
    504: "the request took longer than the server allows",
}


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application around an engine, which the caller closes.

    Raises:
        RoutingError, ServerError: the model cannot do what the settings say.
    """
    settings = settings or ServerSettings()
    service = Service.of(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.ready = False

    app = FastAPI(
        title="elastic-moe",
        version=__version__,
        description="OpenAI's endpoints, on which every request chooses its sub-network.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={
            status: {"model": ErrorResponse, "description": description}
            for status, description in _ERROR_DESCRIPTIONS.items()
        },
    )
    app.state.service = service

    chat.add_endpoints(app, service)  # POST /v1/chat/completions
    completions.add_endpoints(app, service)  # POST /v1/completions
    embeddings.add_endpoints(app, service)  # POST /v1/embeddings
    models.add_endpoints(app, service)  # GET /v1/models, /v1/models/{model}
    tokenize.add_endpoints(app, service)  # POST /tokenize, /detokenize; GET /tokenizer_info
    metrics.add_endpoints(app, service)  # GET /metrics
    health.add_endpoints(app, service)  # GET /health, /ready
    admin.add_endpoints(app, service)  # /admin/profiles, /admin/faults, /admin/requests

    # A request passes the last one added first.
    app.add_middleware(FaultInjection, selector=service.faults, history=service.requests)
    app.add_middleware(
        Timeouts,
        read_seconds=settings.read_timeout_seconds,
        request_seconds=settings.request_timeout_seconds,
    )
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Authentication, api_keys=settings.api_keys, admin_keys=settings.admin_keys)
    app.add_middleware(AccessLog, service=service, limited_paths=generating_paths(app))

    app.add_exception_handler(errors.ApiError, errors.handle_failure)
    app.add_exception_handler(ElasticMoEError, errors.handle_failure)
    app.add_exception_handler(ClientDisconnected, _handle_disconnect)
    app.add_exception_handler(HTTPException, errors.handle_http_error)
    app.add_exception_handler(RequestValidationError, errors.handle_invalid_body)
    _describe_errors(app)
    return app


async def _handle_disconnect(_: Request, __: Exception) -> Response:
    return JSONResponse({}, 499)  # for the log: nobody receives it


def _describe_errors(app: FastAPI) -> None:
    """Remove FastAPI's own 422 from /openapi.json: invalid bodies get 400 here."""
    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in generate()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
