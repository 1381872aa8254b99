"""/v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic_moe.protocol.base import Answer, Count, TokenId, Usage
from elastic_moe.protocol.routing import AppliedRouting
from elastic_moe.protocol.sampling import SamplingRequest

Ids = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]


class CompletionRequest(SamplingRequest):
    """Texts to continue.

    Attributes:
        prompt: a text, several, a list of token ids, or several.
        max_tokens: 0 writes nothing: with echo and logprobs it scores the prompt.
        echo: prepend the prompt to the text.
        logprobs: of each token, and of so many most likely ones; with echo also of the prompt.
    """

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Count | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids, one for each text to continue."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class TextLogprobs(Answer):
    """Of the tokens of a choice, or of a chunk of it; the first of a prompt has none.

    Attributes:
        text_offset: start of each token, in characters of the choice's text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class TextChoice(Answer):
    """One of the texts, or a piece of it."""

    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Answer):
    """The whole answer, or an event of a stream; `data: [DONE]` is the last one.

    Attributes:
        usage: of a stream, in its last chunk, which has no choices, if it was asked for.
        routing: of a stream, in the chunks that have a finish_reason.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    usage: Usage | None = None
    routing: AppliedRouting | None = None
