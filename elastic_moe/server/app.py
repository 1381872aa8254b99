"""The application: which endpoint answers what."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from elastic_moe import __version__, protocol
from elastic_moe.engine import Engine
from elastic_moe.errors import ElasticMoEError
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.server.api import admin, small
from elastic_moe.server.api.chat import Chat
from elastic_moe.server.api.completions import TextCompleting
from elastic_moe.server.api.embeddings import embeddings
from elastic_moe.server.errors import ApiError, tell_failure, tell_http, tell_invalid
from elastic_moe.server.middleware.gate import Gate
from elastic_moe.server.middleware.injector import INJECTION, Injector
from elastic_moe.server.observe.account import ACCOUNT
from elastic_moe.server.routing.request import RoutingRequest
from elastic_moe.server.service import Service
from elastic_moe.server.settings import ServerSettings
from elastic_moe.server.sse import ClientGone

_FAILURES = {
    400: "the request cannot be served as it is written",
    401: "an API key is needed",
    404: "there is no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    429: "too many requests are unfinished",
    503: "the server is ending, or lacks something that is needed",
    504: "the request took longer than the server allows",
}


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application around an engine, which the caller closes.

    Raises:
        RoutingError, ServerError: the model cannot do what the settings say.
    """
    service = Service.of(engine, settings or ServerSettings())

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
            status: {"model": protocol.ErrorResponse, "description": text}
            for status, text in _FAILURES.items()
        },
    )
    app.state.service = service
    for kind in (ApiError, ElasticMoEError):
        app.add_exception_handler(kind, tell_failure)
    app.add_exception_handler(ClientGone, _nobody)
    app.add_exception_handler(HTTPException, tell_http)
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.add_middleware(Injector, faults=service.faults, log=service.requests)
    app.add_middleware(Gate, service=service)  # the last that is added comes first
    _add_generation(app, service)
    small.add_endpoints(app, service)
    admin.add_endpoints(app, service)
    _describe(app)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    def routing_of(
        body: SamplingRequest | protocol.EmbeddingRequest, request: Request
    ) -> RoutingRequest:
        injection = request.scope.get(INJECTION)
        routing = service.routing_request(body.model, body.routing_config, body.profile, injection)
        return replace(routing, account=request.scope[ACCOUNT])

    @app.post("/v1/chat/completions", **_answers(protocol.ChatCompletion, protocol.ChatChunk))
    async def chat_completions(body: protocol.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        routing = routing_of(body, request)
        return await Chat(service, routing.with_sampling(body), routing).answer(request.receive)

    @app.post("/v1/completions", **_answers(protocol.TextCompletion, protocol.TextCompletion))
    async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        routing = routing_of(body, request)
        return await TextCompleting(service, routing.with_sampling(body), routing).answer(
            request.receive
        )

    @app.post(
        "/v1/embeddings",
        response_model=None,
        responses={200: {"model": protocol.EmbeddingResponse, "description": "the vectors"}},
    )
    async def embed(body: protocol.EmbeddingRequest, request: Request) -> Response:
        """Make vectors of texts, for tests."""
        return await embeddings(service, body, routing_of(body, request), request.receive)


def _answers(whole: type[Any], piece: type[Any]) -> dict[str, Any]:
    """What a generating endpoint answers, for the OpenAPI description."""
    stream = {"schema": {"type": "string", "description": f"events of {piece.__name__} as JSON"}}
    return {
        "response_model": None,
        "responses": {
            200: {
                "model": whole,
                "description": "the answer, or a stream of events",
                "content": {"text/event-stream": stream},
            }
        },
    }


async def _nobody(_: Request, __: Exception) -> Response:
    return JSONResponse({}, 499)  # nobody reads it


def _describe(app: FastAPI) -> None:
    """Have the OpenAPI description tell 400 where FastAPI would tell its own 422."""
    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in generate()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
