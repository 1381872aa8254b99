"""The smaller endpoints: models, tokens, errors."""

from __future__ import annotations

from typing import Any, Literal

from elastic_moe.protocol.base import Answer, Body, TokenId
from elastic_moe.protocol.chat import Message


class Error(Answer):
    """What went wrong.

    Attributes:
        param: the part of the request that it is about.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Answer):
    """The body of every answer that is not a success."""

    error: Error


class ElasticAxes(Answer):
    """What a request may choose from.

    Attributes:
        max_depth: layers.
        max_top_k: experts per token.
        num_experts: that may be chosen from.
        width_granules: of each expert.
        trained: the values that the checkpoint was trained for, by axis; empty if it tells none.
        profiles: names for `profile`, or after '@' in the model's name.
    """

    max_depth: int
    max_top_k: int
    num_experts: int
    width_granules: int
    trained: dict[str, list[Any]]
    profiles: list[str]


class ModelCard(Answer):
    """A name that requests may ask for.

    Attributes:
        root: the checkpoint's own name.
        max_model_len: tokens of prompt and answer together.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["elastic-moe"] = "elastic-moe"
    root: str
    max_model_len: int
    elastic: ElasticAxes


class ModelList(Answer):
    """All names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Body):
    """A prompt or messages, not both.

    Attributes:
        add_special_tokens: of a prompt: as a completion would read it.
        add_generation_prompt: of messages: as an answer would begin.
        return_token_strs: also tell the tokens' texts.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class TokenizeResponse(Answer):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[TokenId]


class DetokenizeResponse(Answer):
    """Their text, special tokens included."""

    prompt: str


class TokenizerInfo(Answer):
    """What a client must know to make prompts itself.

    Attributes:
        bos_token, eos_token, pad_token: as vLLM names them, for clients that were made for it;
            eos_token is the first of those that end a text.
    """

    vocab_size: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_ids: list[int]
    pad_token: str | None
    pad_token_id: int | None
    chat_template: str | None
