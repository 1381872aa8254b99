"""What goes over the wire: the bodies of OpenAI's API, with a request's sub-network beside them.

Requests are strict: a key that nobody knows, or a number written as text, is an error, as a knob
must never be ignored without a word.
"""

from elastic_moe.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from elastic_moe.protocol.completions import CompletionRequest, TextCompletion
from elastic_moe.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from elastic_moe.protocol.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from elastic_moe.protocol.routing import AppliedRouting, RoutingConfig

__all__ = [
    "AppliedRouting",
    "ChatChunk",
    "ChatCompletion",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "DetokenizeResponse",
    "EmbeddingRequest",
    "EmbeddingResponse",
    "ErrorResponse",
    "ModelCard",
    "ModelList",
    "RoutingConfig",
    "TextCompletion",
    "TokenizeRequest",
    "TokenizeResponse",
    "TokenizerInfo",
]
