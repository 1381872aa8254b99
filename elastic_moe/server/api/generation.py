"""The path that all generating endpoints share: sub-network, generation, streams, cancelling."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import FastAPI
from fastapi.routing import APIRoute
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
from elastic_moe.server.service import Service, usage
from elastic_moe.server.sse import EventStream, event

B = TypeVar("B", bound=SamplingRequest)
EventWriter = Callable[[Delta], Iterable[bytes]]
EVENTS = "text/event-stream"


class GenerationHandler(ABC, Generic[B]):
    """Answers one request, as a whole or as a stream.

    A subclass of each endpoint reads prompts and parameters and writes choices. Routing, limits,
    cancelling, injected texts, usage and the record are here.

    Attributes:
        id_prefix: of the answer's id.
        object_name, chunk_object_name: `object` of a whole answer, and of the events of a stream.
        body: of the request; a profile has filled in what it leaves out.
        record: of the request.
        prompts: token ids of every prompt, once `respond` has encoded them.
        routing: the sub-network that runs, once `respond` has chosen it.

    Raises:
        ApiError, RoutingError: the model, profile, sub-network or stream_options are invalid.
    """

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]

    def __init__(self, service: Service, body: B, request: Request) -> None:
        injection: Injection | None = request.scope.get(INJECTION)
        self._routing_request = service.routing.request(
            body.model, body.routing_config, body.profile, injection
        )
        self.service, self.body = service, self._routing_request.with_sampling(body)
        self.record: AccessRecord = request.scope[ACCESS_RECORD]
        self.prompts: list[list[int]]
        self.routing: ResolvedRouting
        self._receive = request.receive
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true.", param="stream_options")

    @abstractmethod
    def encode(self) -> list[list[int]]:
        """Token ids of every prompt; it runs in a thread."""

    @abstractmethod
    def sampling_params(self) -> SamplingParams:
        """How to sample; the engine checks that prompts and max_tokens fit the context."""

    @abstractmethod
    def choices(self, completions: list[Completion]) -> list[dict[str, Any]]:
        """`choices` of a whole answer, with the keys that OpenAI's API gives them."""

    @abstractmethod
    def event_writer(self, envelope: Mapping[str, Any]) -> EventWriter:
        """Writes the events of one stream; the last one of a prompt has `applied`.

        After the first event of a choice, a `Delta` without text, logprobs and `finish_reason`
        writes nothing.

        Args:
            envelope: the first keys of each event.
        """

    async def respond(self) -> Response:
        """The response.

        Raises:
            ApiError, ElasticMoEError: the request is invalid, or the engine failed.
        """
        self.prompts = await asyncio.to_thread(self.encode)
        params = self.sampling_params()
        tokens = max(map(len, self.prompts)) + params.max_tokens
        self.routing = self._routing_request.resolve(tokens)
        self.record.subnet = self.routing.subnet.name
        headers = {"x-elastic-subnet": self.routing.subnet.name}
        params = force_text(params, self._routing_request.injection)
        if self.body.stream:
            return EventStream(self._events(params), headers)
        work = self.service.engine.agenerate(self.prompts, self.routing.subnet, params)
        completions = await cancel_on_disconnect(self._receive, work)
        self.record.completions += completions
        body = {
            **self._envelope(self.object_name),
            "choices": self.choices(completions),
            "usage": self._usage(),
            "routing": self.applied(completions[0]),
        }
        return json_response(body, headers)

    def applied(self, completion: Completion) -> dict[str, Any]:
        """`routing` of a whole answer, and of the last event of a prompt."""
        return self.service.applied(self.routing, completion.routing)

    async def _events(self, params: SamplingParams) -> AsyncGenerator[bytes]:
        envelope = self._envelope(self.chunk_object_name)
        write = self.event_writer(envelope)
        astream = self.service.engine.astream
        async with aclosing(astream(self.prompts, self.routing.subnet, params)) as deltas:
            async for delta in deltas:
                if delta.completion is not None:
                    self.record.completions.append(delta.completion)
                for data in write(delta):
                    yield data
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield event({**envelope, "choices": [], "usage": self._usage()})

    def _envelope(self, object_name: str) -> dict[str, Any]:
        """The first keys of an answer, and of each event of a stream."""
        return {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": object_name,
            "created": int(time.time()),
            "model": self.body.model,
            "system_fingerprint": self.service.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        return usage(*(completion.usage for completion in self.record.completions))


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
                "content": {EVENTS: stream},
            }
        },
    }


def generating_paths(app: FastAPI) -> frozenset[str]:
    """Paths of the endpoints that `describe_answer` describes."""
    return frozenset(
        route.path
        for route in app.routes
        if isinstance(route, APIRoute) and EVENTS in route.responses.get(200, {}).get("content", {})
    )
