"""Log-probabilities in the two forms of OpenAI's API: chat and text completion."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.model.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # for minus infinity, which JSON cannot express
_UTF8 = codecs.getincrementaldecoder("utf-8")
# A prompt: its first id, which has no log-probability, and the rest.
EchoedPrompt = tuple[int, Sequence[TokenLogprob]]


class TextOffset:
    """The position in a text, in characters, while its tokens are read one by one.

    A token starts after the last complete character before it. Invalid UTF-8 counts as U+FFFD, as
    in decoded text.
    """

    def __init__(self) -> None:
        self._decoder, self._characters = _UTF8("replace"), 0

    def append(self, data: bytes) -> int:
        """Append the bytes of a token; returns where it starts."""
        start = self._characters
        self._characters += len(self._decoder.decode(data))
        return start

    def flush(self) -> None:
        """End an incomplete character: the next token starts a text of its own."""
        self._characters += len(self._decoder.decode(b"", final=True))
        self._decoder.reset()


class LogprobWriter:
    """Writes log-probabilities with the token texts of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = lru_cache(maxsize=1 << 16)(tokenizer.token_bytes)
        self._special = tokenizer.special_ids

    def token_text(self, token_id: int) -> str:
        """A token's text; incomplete UTF-8 as 'bytes:\\xe2\\x98', like OpenAI's."""
        data = self._bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        """`protocol.chat.ChatLogprobs`."""
        content = [
            {
                **self._token(token.token_id, token.logprob),
                "top_logprobs": [self._token(*pair) for pair in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def completion(
        self, tokens: Sequence[TokenLogprob], offset: TextOffset, echoed: EchoedPrompt | None = None
    ) -> dict[str, Any]:
        """`protocol.completions.TextLogprobs` of a choice, or of its next piece.

        Args:
            offset: of these tokens in the choice's text; advanced past them.
            echoed: the prompt, if the text starts with it.
        """
        ids, offsets = [token.token_id for token in tokens], []
        no_logprob: list[None] = []
        if echoed is not None:
            first, others = echoed
            no_logprob, tokens = [None], [*others, *tokens]
            prompt = [first, *(token.token_id for token in others)]
            offsets = self._offsets(prompt, offset)
            offset.flush()
            ids = [*prompt, *ids]
        offsets += self._offsets(ids[len(offsets) :], offset)
        return {
            "tokens": [self.token_text(token_id) for token_id in ids],
            "token_logprobs": [*no_logprob, *(_finite(token.logprob) for token in tokens)],
            "top_logprobs": [
                *no_logprob,
                *(
                    {self.token_text(i): _finite(value) for i, value in token.top}
                    for token in tokens
                ),
            ],
            "text_offset": offsets,
        }

    def _offsets(self, ids: Iterable[int], offset: TextOffset) -> list[int]:
        special = self._special  # not in the text
        return [offset.append(b"" if i in special else self._bytes(i)) for i in ids]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._bytes(token_id)),
        }


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
