"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64

from fastapi import FastAPI, Request, Response

from elastic_moe.engine.outputs import Embedding
from elastic_moe.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from elastic_moe.server.api.completions import MAX_PROMPTS
from elastic_moe.server.api.generation import json_response
from elastic_moe.server.disconnect import cancel_on_disconnect
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.fault_injection import INJECTION
from elastic_moe.server.observe.access_record import ACCESS_RECORD
from elastic_moe.server.service import Service


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoint of this module to the application."""

    @app.post(
        "/v1/embeddings",
        response_model=None,
        responses={200: {"model": EmbeddingResponse, "description": "the vectors"}},
    )
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        """Make vectors of texts, for tests."""
        return await create_embeddings(service, body, request)


async def create_embeddings(service: Service, body: EmbeddingRequest, request: Request) -> Response:
    """Embed all texts; a disconnect cancels it.

    Raises:
        ApiError, ElasticMoEError: the request is invalid, or the engine failed.
    """
    injection = request.scope.get(INJECTION)
    request_routing = service.routing.request(
        body.model, body.routing_config, body.profile, injection
    )
    inputs, hidden_size = body.inputs(), service.engine.config.hidden_size
    if len(inputs) > MAX_PROMPTS:
        raise ApiError(
            400, f"input must be at most {MAX_PROMPTS} texts, got {len(inputs)}.", param="input"
        )
    if body.dimensions not in (None, hidden_size):
        raise ApiError(
            400,
            f"dimensions must be {hidden_size}, the model's hidden size, got {body.dimensions}.",
            param="dimensions",
        )
    engine = service.engine

    def encode() -> list[list[int]]:
        return [engine.encode(text) if isinstance(text, str) else text for text in inputs]

    prompts = await asyncio.to_thread(encode)
    routing = request_routing.resolve(max(map(len, prompts)))
    request.scope[ACCESS_RECORD].subnet = routing.subnet.name

    async def embed_all() -> list[Embedding]:
        return [await asyncio.to_thread(engine.embed, ids, routing.subnet) for ids in prompts]

    embeddings = await cancel_on_disconnect(request.receive, embed_all())
    tokens = sum(embedding.prompt_tokens for embedding in embeddings)
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encode_vector(embedding, body)}
            for index, embedding in enumerate(embeddings)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "routing": service.applied(routing, embeddings[0].routing),
    }
    return json_response(answer, {"x-elastic-subnet": routing.subnet.name})


def _encode_vector(embedding: Embedding, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "float":
        numbers: list[float] = embedding.vector.tolist()
        return numbers
    return base64.b64encode(embedding.vector.astype("<f4").tobytes()).decode()
