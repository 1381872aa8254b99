"""From tokens to the text that may be streamed: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.model.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes the tokens of one choice: one by one and then the rest, or all at once.

    Args:
        stop: texts that end it and are no part of it.

    Attributes:
        text: the whole, once it is finished.
        stopped: whether a stop text came.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = tokenizer.stream()
        self._released = 0  # characters that were streamed

    def add(self, token_id: int) -> str:
        """Add a token; the text that may be streamed now."""
        text = self._stream.step(token_id)
        if not self._stop:
            self._released += len(text)
            return text
        self.text += text
        at = self._find_stop()
        if at is None:
            return self._release(len(self.text) - self._held_back())
        self.text, self.stopped = self.text[:at], True
        return self._release(at)

    def finish(self, token_ids: Sequence[int]) -> str:
        """The rest of the text of all tokens; unfinished characters become U+FFFD, as in decode."""
        if not self.stopped:
            self.text = self._tokenizer.decode(token_ids)
        return self._release(len(self.text))

    def _release(self, end: int) -> str:
        """The text up to `end` that was not streamed yet."""
        start, self._released = self._released, max(self._released, end)
        return self.text[start:end]

    def _find_stop(self) -> int | None:
        """Where the stop text begins that was complete first, or None.

        It does not depend on how the text is cut into tokens.
        """
        found = [(self.text.find(stop, self._released), len(stop)) for stop in self._stop]
        return min(((at + size, at) for at, size in found if at >= 0), default=(0, None))[1]

    def _held_back(self) -> int:
        """Characters at the end of the text that may turn out to begin a stop text."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )
