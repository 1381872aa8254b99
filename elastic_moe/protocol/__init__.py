"""Wire types: request and response bodies of OpenAI's API, extended by routing.

Requests are strict: an unknown key, or a number written as text, is an error. No knob is silently
ignored.
"""

from elastic_moe.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from elastic_moe.protocol.completions import CompletionRequest, TextCompletion
from elastic_moe.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from elastic_moe.protocol.errors import ErrorResponse
from elastic_moe.protocol.models import ModelCard, ModelList
from elastic_moe.protocol.routing import AppliedRouting, RoutingConfig
from elastic_moe.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

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
