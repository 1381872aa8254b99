"""What a single token stands for: its bytes, which may be half a character, and its text."""

from __future__ import annotations

import json
import re
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Bytes of the tokens of one tokenizer."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast

    def of(self, token_id: int) -> bytes:
        """The bytes of a token in the middle of a text; none of an id that the tokenizer lacks."""
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if "ByteLevel" in self._decoders:
            letters = _byte_letters()
            if all(letter in letters for letter in token):
                return bytes(letters[letter] for letter in token)
        fallback = _FALLBACK.fullmatch(token) if "ByteFallback" in self._decoders else None
        if fallback is not None:
            return bytes([int(fallback[1], 16)])
        # Behind another token, as decoders strip what begins a text.
        before, ids = self._before
        decode = self._fast.decode
        return decode([*ids, token_id], skip_special_tokens=False)[len(before) :].encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._fast.get_added_tokens_decoder())

    @cached_property
    def _before(self) -> tuple[str, list[int]]:
        ids = self._fast.encode("a", add_special_tokens=False).ids
        return self._fast.decode(ids, skip_special_tokens=False), ids

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Kinds of the decoders that run, one after the other."""
        decoder = self._fast.decoder
        state: Any = {} if decoder is None else json.loads(decoder.__getstate__())
        return frozenset(part.get("type") for part in (state, *state.get("decoders", ())))


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte -> the byte.

    Source: GPT-2. Bytes that are visible in Latin-1 stand for themselves, the others for what
    follows U+0100, in their order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
