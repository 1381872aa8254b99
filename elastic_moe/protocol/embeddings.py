"""/v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic_moe.protocol.base import Answer, Count, Ignored
from elastic_moe.protocol.completions import Ids, Texts
from elastic_moe.protocol.routing import AppliedRouting, RoutingConfig


class EmbeddingRequest(Ignored):
    """Texts to embed: for tests, as no model here was trained for it.

    Attributes:
        input: a text, several, a list of token ids, or several.
        encoding_format: numbers, or the bytes of float32 numbers (little-endian) in base64.
        dimensions: the model's hidden size, or absent.
        profile: name of a profile of the server: a sub-network.
    """

    model: str
    input: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    routing_config: RoutingConfig | None = None
    profile: Annotated[str, Field(min_length=1)] | None = None

    def inputs(self) -> list[str | list[int]]:
        """Texts or token ids, one for each vector."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class EmbeddingItem(Answer):
    """One vector, of length 1."""

    object: Literal["embedding"] = "embedding"
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Answer):
    """All vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
    routing: AppliedRouting
