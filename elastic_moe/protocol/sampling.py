"""Sampling and routing, which chat and text requests share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from elastic_moe.protocol.base import Body, Count, Ignored, TokenId
from elastic_moe.protocol.routing import RoutingConfig

Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(Body):
    """Options of a stream.

    Attributes:
        include_usage: end the stream with a chunk that has the usage and no choices.
    """

    include_usage: bool = False
    include_obfuscation: Any = Field(None, description="accepted and ignored")


class JsonSchema(Body):
    """A schema with its name, as OpenAI's API has it."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @field_validator("json_schema")
    @classmethod
    def _for_its_type(cls, value: JsonSchema | None, info: Any) -> JsonSchema | None:
        if value is not None and info.data.get("type") != "json_schema":
            raise ValueError("is for type json_schema alone")
        return value


class SamplingRequest(Ignored):
    """The fields that every generating request may have.

    Attributes:
        model: its name, perhaps with a sub-network: elastic-mini@L24-k2.
        temperature: 0 takes the most likely token.
        seed: equal requests with equal seeds get equal answers.
        routing_config: the sub-network; not together with another one in the model's name.
        profile: name of a profile of the server: a sub-network, and sampling.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Stop | list[Stop] | None = None
    stop_token_ids: list[TokenId] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    routing_config: RoutingConfig | None = None
    profile: Annotated[str, Field(min_length=1)] | None = None
