"""The text that tokens make, as it may be read: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.model.text.tokenizer import Tokenizer


class TextWriter:
    """Makes a text of tokens, one by one and then to the end, or all at once.

    Args:
        stop: texts that end it and are no part of it.

    Attributes:
        text: the whole, once it is finished.
        stopped: whether it came to a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = tokenizer.stream()
        self._read = 0  # characters that may have been read

    def write(self, token_id: int) -> str:
        """Add a token; what it lets be read."""
        text = self._stream.step(token_id)
        if not self._stop:
            self._read += len(text)
            return text
        self.text += text
        at = self._find_stop()
        if at is None:
            return self._release(len(self.text) - self._held_back())
        self.text, self.stopped = self.text[:at], True
        return self._release(at)

    def finish(self, token_ids: Sequence[int]) -> str:
        """The rest, when these were all tokens; unfinished characters become U+FFFD, as in decode.

        It may be the whole, if none was written.
        """
        if not self.stopped:
            self.text = self._tokenizer.decode(token_ids)
        return self._release(len(self.text))

    def _release(self, end: int) -> str:
        """What comes to be read when it may be read up to here."""
        start, self._read = self._read, max(self._read, end)
        return self.text[start:end]

    def _find_stop(self) -> int | None:
        """Where the stop text begins that was whole first, or None.

        Which one that is does not depend on how the text is cut into tokens.
        """
        found = [(self.text.find(stop, self._read), len(stop)) for stop in self._stop]
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
