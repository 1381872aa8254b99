"""What answering a chat and completing a text have in common."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, ClassVar

from starlette.responses import Response
from starlette.types import Receive

from elastic_moe.engine import SamplingParams
from elastic_moe.engine.outputs import Completion, Delta
from elastic_moe.protocol.sampling import SamplingRequest
from elastic_moe.routing import Subnet
from elastic_moe.server.errors import ApiError
from elastic_moe.server.events import unless_gone
from elastic_moe.server.service import Service


class Answering:
    """One request on its way.

    Attributes:
        subnet: that it runs under.
        headers: of the answer.
        include_usage: whether its stream ends with its usage.
    """

    prefix: ClassVar[str]  # of ids

    def __init__(self, service: Service, body: SamplingRequest, subnet: Subnet) -> None:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true.", param="stream_options")
        options = body.stream_options
        self.service, self.subnet, self._model = service, subnet, body.model
        self.include_usage = options is not None and options.include_usage
        self.headers = {"x-elastic-subnet": subnet.name}

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
        work = self.service.engine.agenerate(prompts, self.subnet, params)
        done: list[Completion] = await unless_gone(receive, work)
        return done

    def streams(
        self, prompts: Sequence[list[int]], params: SamplingParams
    ) -> list[AsyncGenerator[Delta]]:
        """The same, piece by piece."""
        astream = self.service.engine.astream
        return [astream(prompt, self.subnet, params) for prompt in prompts]


def answer_json(body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """A body as JSON."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, 200, dict(headers), "application/json")
