"""A text that is being read or written, as the scheduler sees it: tokens, pages, progress."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

from elastic_moe.engine.scheduling.block_manager import PAGE_TOKENS, Page


class Sequence:
    """Tokens under one sub-network, and how many of them are computed.

    Attributes:
        arrival: (request, choice), its place in the order of service; unique.
        token_ids: the prompt, and what was generated.
        prompt_tokens: how many of them are the prompt.
        kv_keys: `Subnet.kv_keys`, one per active layer.
        after: it begins when this one has computed its prompt, to share it.
        computed: tokens whose keys and values are in its pages.
        reads_cache: whether it may begin with pages that others computed.
        prompt_done: whether its prompt was computed once, or never will be.
        pages: of 16 tokens each.
        cached_tokens: of the prompt, those that were found in the prefix cache at first.
    """

    __slots__ = (
        "_digest",
        "_keys",
        "after",
        "arrival",
        "cached_tokens",
        "computed",
        "kv_keys",
        "pages",
        "prompt_done",
        "prompt_tokens",
        "published",
        "reads_cache",
        "token_ids",
    )

    def __init__(
        self,
        arrival: tuple[int, int],
        prompt: list[int],
        kv_keys: tuple[bytes, ...],
        *,
        after: Sequence | None = None,
    ) -> None:
        self.arrival, self.kv_keys, self.after = arrival, kv_keys, after
        self.token_ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.computed = 0
        self.prompt_done = False
        self.reads_cache = True
        self.published = 0  # pages that others may find, or that were not worth it
        self.pages: list[Page] = []
        self.cached_tokens: int | None = None
        self._keys: list[bytes] = []
        self._digest: Any = hashlib.sha256(b"elastic-moe tokens 1\0")

    @property
    def depth(self) -> int:
        """Layers that run."""
        return len(self.kv_keys)

    @property
    def remaining(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.token_ids) - self.computed

    @property
    def waits(self) -> bool:
        """Whether the one that it comes after still has its prompt to compute."""
        return self.after is not None and not self.after.prompt_done

    def tokens_keys(self, pages: int) -> list[bytes]:
        """For each of the first pages, a digest of all tokens up to its end."""
        for page in range(len(self._keys), pages):
            own = self.token_ids[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
            self._digest.update(array("i", own))
            self._keys.append(self._digest.digest())
        return self._keys[:pages]


def pages_for(tokens: int) -> int:
    """Pages that so many tokens fill or begin."""
    return -(-tokens // PAGE_TOKENS)
