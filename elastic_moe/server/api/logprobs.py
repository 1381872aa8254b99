"""Log-probabilities in the two forms that OpenAI's API has."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.model.text.tokenizer import Tokenizer

LEAST = -9999.0  # instead of minus infinity, which JSON cannot say
_UTF8 = codecs.getincrementaldecoder("utf-8")
Echoed = tuple[int, Sequence[TokenLogprob]]  # a prompt: its first id, which has none, and the rest


class Place:
    """A place in a text, in characters, which moves with the tokens that are written.

    A token begins where the characters before it end that are whole; bytes that are no UTF-8 are
    the characters U+FFFD, as in decoded text.
    """

    def __init__(self) -> None:
        self._decoder, self._characters = _UTF8("replace"), 0

    def take(self, data: bytes) -> int:
        """Where a token begins that stands for these bytes, which end the text then."""
        begin = self._characters
        self._characters += len(self._decoder.decode(data))
        return begin

    def end(self) -> None:
        """What follows is decoded for itself."""
        self._characters += len(self._decoder.decode(b"", final=True))
        self._decoder.reset()


class LogprobWriter:
    """Writes them with the texts of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = lru_cache(maxsize=1 << 16)(tokenizer.token_bytes)
        self._special = tokenizer.special_ids

    def text(self, token_id: int) -> str:
        """A token's text; what is half a character is told by its bytes: 'bytes:\\xe2\\x98'."""
        own = self._bytes(token_id)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def chat(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        """`protocol.chat.ChatLogprobs`."""
        content = [
            {
                **self._one(token.token_id, token.logprob),
                "top_logprobs": [self._one(*pair) for pair in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def completion(
        self, tokens: Sequence[TokenLogprob], place: Place, echoed: Echoed | None = None
    ) -> dict[str, Any]:
        """`protocol.completions.TextLogprobs` of a choice, or of its next piece.

        Args:
            place: where they begin in the choice's text; it is moved behind them.
            echoed: the prompt, which the text begins with.
        """
        ids, offsets = [token.token_id for token in tokens], []
        nothing: list[None] = []
        if echoed is not None:
            first, others = echoed
            nothing, tokens = [None], [*others, *tokens]
            read = [first, *(token.token_id for token in others)]
            offsets = self._offsets(read, place)
            place.end()
            ids = [*read, *ids]
        offsets += self._offsets(ids[len(offsets) :], place)
        return {
            "tokens": [self.text(token_id) for token_id in ids],
            "token_logprobs": [*nothing, *(_finite(token.logprob) for token in tokens)],
            "top_logprobs": [
                *nothing,
                *({self.text(i): _finite(value) for i, value in token.top} for token in tokens),
            ],
            "text_offset": offsets,
        }

    def _offsets(self, ids: Iterable[int], place: Place) -> list[int]:
        special = self._special  # which are not in the text
        return [place.take(b"" if i in special else self._bytes(i)) for i in ids]

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._bytes(token_id)),
        }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
