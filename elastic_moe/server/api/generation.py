"""The path that all generating endpoints share: sub-network, generation, streams, cancelling."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Completion, Delta
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.server.disconnect import cancel_on_disconnect
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.fault_injection import INJECTION
from elastic_moe.server.middleware.fault_selection import Injection
from elastic_moe.server.observe.access_record import ACCESS_RECORD, AccessRecord
from elastic_moe.server.routing.request import ResolvedRouting
from elastic_moe.server.service import Service

B = TypeVar("B", bound=SamplingRequest)


class GenerationHandler(Generic[B]):
    """Answers one request: a subclass for each dialect reads prompts and writes answers.

    Attributes:
        body: of the request; a profile has filled in what it leaves out.
        record: of the request.
        routing: the sub-network that runs, once `resolve_routing` was called.
        headers: of the response.

    Raises:
        ApiError, RoutingError: the model, profile, sub-network or stream_options are invalid.
    """

    id_prefix: ClassVar[str]

    def __init__(self, service: Service, body: B, request: Request) -> None:
        injection: Injection | None = request.scope.get(INJECTION)
        self._routing_request = service.routing.request(
            body.model, body.routing_config, body.profile, injection
        )
        self.service, self.body = service, self._routing_request.with_sampling(body)
        self.record: AccessRecord = request.scope[ACCESS_RECORD]
        self.routing: ResolvedRouting
        self.headers: dict[str, str] = {}
        self._receive = request.receive
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true.", param="stream_options")

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def resolve_routing(self, tokens: int) -> None:
        """Set `routing`, and the header that names it.

        Args:
            tokens: of the longest prompt and max_tokens together.

        Raises:
            RoutingError: the server's limits refuse it.
        """
        self.routing = self._routing_request.resolve(tokens)
        self.record.subnet = self.routing.subnet.name
        self.headers["x-elastic-subnet"] = self.routing.subnet.name

    def envelope(self, kind: str) -> dict[str, Any]:
        """The first keys of an answer, and of each event of a stream."""
        return {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.body.model,
            "system_fingerprint": self.service.fingerprint,
        }

    async def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams
    ) -> list[Completion]:
        """Complete all prompts; a disconnect cancels them."""
        params = force_text(params, self._routing_request.injection)
        work = self.service.engine.agenerate(prompts, self.routing.subnet, params)
        completions = await cancel_on_disconnect(self._receive, work)
        self.record.completions += completions
        return completions

    async def stream(
        self, prompts: Sequence[list[int]], params: SamplingParams
    ) -> AsyncIterator[Delta]:
        """Complete all prompts piece by piece."""
        params = force_text(params, self._routing_request.injection)
        astream = self.service.engine.astream
        async with aclosing(astream(prompts, self.routing.subnet, params)) as deltas:
            async for delta in deltas:
                yield delta


def force_text(params: SamplingParams, injection: Injection | None) -> SamplingParams:
    """The parameters with an injected text, which need not obey a JSON schema."""
    if injection is None or injection.effects.force_text is None:
        return params
    text = injection.effects.force_text
    return replace(params, forced_text=text, json_schema=None, json_object=False)


def json_response(body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """A 200 response; text stays UTF-8 instead of escapes."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, 200, dict(headers), "application/json")


def describe_answer(answer: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """Arguments of `app.post` that describe a generating endpoint in /openapi.json."""
    stream = {"schema": {"type": "string", "description": f"events of {chunk.__name__} as JSON"}}
    return {
        "response_model": None,
        "responses": {
            200: {
                "model": answer,
                "description": "the answer, or a stream of events",
                "content": {"text/event-stream": stream},
            }
        },
    }
