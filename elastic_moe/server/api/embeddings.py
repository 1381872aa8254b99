"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64

from starlette.responses import Response
from starlette.types import Receive

from elastic_moe.engine.outputs import Embedding
from elastic_moe.protocol.embeddings import EmbeddingRequest
from elastic_moe.server.api.completions import MAX_PROMPTS
from elastic_moe.server.api.generation import answer_json
from elastic_moe.server.errors import ApiError
from elastic_moe.server.routing.request import RoutingRequest
from elastic_moe.server.service import Service
from elastic_moe.server.sse import unless_gone


async def embeddings(
    service: Service, body: EmbeddingRequest, routing: RoutingRequest, receive: Receive
) -> Response:
    """Vectors of all texts, unless the client goes.

    Raises:
        ApiError, ElasticMoEError: a text cannot be read.
    """
    inputs, hidden = body.inputs(), service.engine.config.hidden_size
    if len(inputs) > MAX_PROMPTS:
        raise ApiError(
            400, f"input must be at most {MAX_PROMPTS} texts, got {len(inputs)}.", param="input"
        )
    if body.dimensions not in (None, hidden):
        raise ApiError(
            400,
            f"dimensions must be {hidden}, the model's hidden size, got {body.dimensions}.",
            param="dimensions",
        )

    engine = service.engine

    def encode() -> list[list[int]]:
        return [engine.encode(own) if isinstance(own, str) else own for own in inputs]

    prompts = await asyncio.to_thread(encode)
    resolved = routing.resolve(max(map(len, prompts)))

    async def read() -> list[Embedding]:
        return [await asyncio.to_thread(engine.embed, ids, resolved.subnet) for ids in prompts]

    done = await unless_gone(receive, read())
    tokens = sum(embedding.prompt_tokens for embedding in done)
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _write(embedding, body)}
            for i, embedding in enumerate(done)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "routing": service.applied(resolved, done[0].routing),
    }
    return answer_json(answer, {"x-elastic-subnet": resolved.subnet.name})


def _write(embedding: Embedding, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "float":
        numbers: list[float] = embedding.vector.tolist()
        return numbers
    return base64.b64encode(embedding.vector.numpy().astype("<f4").tobytes()).decode()
