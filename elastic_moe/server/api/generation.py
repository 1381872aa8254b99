"""What answering a chat and completing a text have in common."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar

from starlette.responses import Response
from starlette.types import Receive

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Completion, Delta
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.server.errors import ApiError
from elastic_moe.server.middleware.faults import Injection
from elastic_moe.server.routing.request import ResolvedRouting, RoutingRequest
from elastic_moe.server.service import Service
from elastic_moe.server.sse import unless_gone


class Answering:
    """One request on its way.

    Attributes:
        routing: the sub-network that it runs, once `resolve_routing` has been called.
        headers: of the answer.
        account: where it is noted what was generated.
        include_usage: whether its stream ends with its usage.
    """

    prefix: ClassVar[str]  # of ids

    def __init__(self, service: Service, body: SamplingRequest, routing: RoutingRequest) -> None:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true.", param="stream_options")
        options = body.stream_options
        self.service, self._request, self._model = service, routing, body.model
        self.routing: ResolvedRouting
        self.include_usage = options is not None and options.include_usage
        self.headers: dict[str, str] = {}
        self.account = routing.account

    def resolve_routing(self, tokens: int) -> None:
        """Set `routing`, and the header that names it.

        Args:
            tokens: of the longest prompt and max_tokens.

        Raises:
            RoutingError: the server's limits refuse it.
        """
        self.routing = self._request.resolve(tokens)
        self.headers["x-elastic-subnet"] = self.routing.subnet.name

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every event of it begins with."""
        return {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._model,
            "system_fingerprint": self.service.fingerprint,
        }

    async def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, receive: Receive
    ) -> list[Completion]:
        """Complete all prompts, unless the client goes."""
        subnet, params = self.routing.subnet, forced(params, self._request.injection)
        work = self.service.engine.agenerate(prompts, subnet, params)
        done = await unless_gone(receive, work)
        self.account.completions += done
        return done

    async def stream(
        self, prompts: Sequence[list[int]], params: SamplingParams
    ) -> AsyncIterator[Delta]:
        """The same, piece by piece."""
        subnet, params = self.routing.subnet, forced(params, self._request.injection)
        async with aclosing(self.service.engine.astream(prompts, subnet, params)) as deltas:
            async for delta in deltas:
                yield delta


def forced(params: SamplingParams, injection: Injection | None) -> SamplingParams:
    """These parameters, but for a text that was injected; it may be no JSON, on purpose."""
    if injection is None or injection.effects.force_text is None:
        return params
    text = injection.effects.force_text
    return replace(params, forced_text=text, json_schema=None, json_object=False)


def answer_json(body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """A body as JSON."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, 200, dict(headers), "application/json")
