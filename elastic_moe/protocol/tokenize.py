"""/tokenize, /detokenize and /tokenizer_info, as in vLLM."""

from __future__ import annotations

from elastic_moe.protocol.base import Answer, Body, TokenId
from elastic_moe.protocol.chat import Message


class TokenizeRequest(Body):
    """Exactly one of prompt and messages.

    Attributes:
        add_special_tokens: encode the prompt as /v1/completions does.
        add_generation_prompt: end the messages where the answer starts.
        return_token_strs: return the text of each token, too.
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
    """Token ids to decode."""

    model: str | None = None
    tokens: list[TokenId]


class DetokenizeResponse(Answer):
    """Their text, special tokens included."""

    prompt: str


class TokenizerInfo(Answer):
    """For clients that build prompts themselves.

    Attributes:
        bos_token, eos_token, pad_token: vLLM's names. eos_token is the first of several.
    """

    vocab_size: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_ids: list[int]
    pad_token: str | None
    pad_token_id: int | None
    chat_template: str | None
