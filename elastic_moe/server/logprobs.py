"""Log-probabilities in the two forms that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.model.tokenizer import Tokenizer

LEAST = -9999.0  # instead of minus infinity, which JSON cannot say


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
        self, tokens: Sequence[TokenLogprob], *, first: int | None = None, offset: int = 0
    ) -> dict[str, Any]:
        """`protocol.completions.TextLogprobs`.

        Args:
            first: id of a token before them that has no log-probability.
            offset: characters of the choice's text before them.
        """
        ids = [*([] if first is None else [first]), *(token.token_id for token in tokens)]
        nothing: list[None] = [] if first is None else [None]
        offsets, written = [], b""
        for token_id in ids:
            offsets.append(offset + len(written.decode(errors="ignore")))
            if token_id not in self._special:  # which are not in the text
                written += self._bytes(token_id)
        return {
            "tokens": [self.text(token_id) for token_id in ids],
            "token_logprobs": [*nothing, *(_finite(token.logprob) for token in tokens)],
            "top_logprobs": [
                *nothing,
                *({self.text(i): _finite(value) for i, value in token.top} for token in tokens),
            ],
            "text_offset": offsets,
        }

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._bytes(token_id)),
        }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
