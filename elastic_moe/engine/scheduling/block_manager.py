"""Which blocks of keys and values belong to whom: paging, shared prefixes, eviction. No tensors.

A block is 16 positions of one layer. A page is 16 positions of a sequence: one block for each layer
that runs, so that a sequence's memory is in proportion to its active layers. A full page stays
after its sequences are gone, until its blocks are needed: whoever begins with the same tokens under
a sub-network that leaves the same keys and values may use it. What a deeper network left serves a
shallower one, which reads its first layers; never the reverse, as the layers above are missing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elastic_moe.errors import EngineError

PAGE_TOKENS = 16


@dataclass(slots=True, eq=False)
class Page:
    """Sixteen positions of all layers that ran.

    Attributes:
        blocks: one per active layer, in their order.
        users: sequences that have it.
        tokens_key: digest of all tokens up to its end, once others may find it; else None.
        kv_keys: of the sub-network that wrote it, `Subnet.kv_keys`.
    """

    blocks: tuple[int, ...]
    users: int = 1
    tokens_key: bytes | None = None
    kv_keys: tuple[bytes, ...] = ()

    def serves(self, kv_keys: Sequence[bytes]) -> bool:
        """Whether a sub-network with these keys would have written the same in its layers."""
        depth = len(kv_keys)
        return depth <= len(self.kv_keys) and self.kv_keys[depth - 1] == kv_keys[-1]


class BlockManager:
    """Gives out pages. Not safe for use from several threads.

    Args:
        num_blocks: how many there are.
        prefix_caching: whether full pages stay for others.
    """

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._shared: dict[bytes, list[Page]] = {}  # tokens_key -> pages that others may find
        self._idle: OrderedDict[Page, None] = OrderedDict()  # those without users, oldest first
        self._idle_blocks = 0
        self.evicted_pages = 0

    @property
    def available_blocks(self) -> int:
        """Blocks that `allocate` can give: free ones, and those of pages without users."""
        return len(self._free) + self._idle_blocks

    @property
    def used_blocks(self) -> int:
        """Blocks of pages that have users."""
        return self.num_blocks - self.available_blocks

    def allocate(self, depth: int) -> Page | None:
        """An empty page for so many layers; None if there are not enough blocks."""
        if depth > self.available_blocks:
            return None
        while len(self._free) < depth:
            self._evict()
        blocks = tuple(self._free[-depth:])
        del self._free[-depth:]
        return Page(blocks)

    def match(self, keys: Iterable[bytes], kv_keys: Sequence[bytes]) -> list[Page]:
        """The pages of the longest prefix that is there; `share` them before anything else.

        Args:
            keys: digests of all tokens up to the end of each of its full pages.
            kv_keys: of its sub-network.
        """
        pages = []
        for key in keys:
            page = self._find(key, kv_keys)
            if page is None:
                break
            pages.append(page)
        return pages

    def idle_blocks_of(self, pages: Iterable[Page]) -> int:
        """How many blocks `share` of these would make unavailable."""
        return sum(len(page.blocks) for page in pages if not page.users)

    def share(self, page: Page) -> None:
        """Have another user of a page."""
        if not page.users:
            del self._idle[page]
            self._idle_blocks -= len(page.blocks)
        page.users += 1

    def release(self, pages: Sequence[Page]) -> None:
        """Take a user from each. What comes later in a sequence is evicted before its beginning."""
        for page in reversed(pages):
            page.users -= 1
            if page.users:
                continue
            if page.tokens_key is None:
                self._free.extend(reversed(page.blocks))
            else:
                self._idle[page] = None
                self._idle_blocks += len(page.blocks)

    def publish(self, page: Page, tokens_key: bytes, kv_keys: tuple[bytes, ...]) -> None:
        """Let others find a page that is full now, unless they find one as good."""
        if self.prefix_caching and self._find(tokens_key, kv_keys) is None:
            page.tokens_key, page.kv_keys = tokens_key, kv_keys
            self._shared.setdefault(tokens_key, []).append(page)

    def drop_idle(self) -> None:
        """Forget all pages without users."""
        while self._idle:
            self._evict()

    def check_integrity(self, held: Iterable[Sequence[Page]]) -> None:
        """Raise `EngineError` unless every block is in exactly one place.

        Args:
            held: the pages of every sequence.
        """
        users = Counter(page for pages in held for page in pages)
        findable = [page for pages in self._shared.values() for page in pages]
        pages = {*users, *self._idle, *findable}
        blocks = [*self._free, *(block for page in pages for block in page.blocks)]
        for broken, what in (
            (sorted(blocks) != list(range(self.num_blocks)), "a block is lost or in two places"),
            (any(page.users != users[page] for page in pages), "a page counts its users wrongly"),
            (len(findable) != len(set(findable)), "a page is found in two places"),
            (
                any(page.tokens_key != key for key, kept in self._shared.items() for page in kept),
                "a page is found under another's key",
            ),
            (
                set(self._idle) != {page for page in findable if not page.users},
                "a page without users is not up for eviction, or one with users is",
            ),
            (
                self._idle_blocks != sum(len(page.blocks) for page in self._idle),
                "the blocks of pages without users are counted wrongly",
            ),
        ):
            if broken:
                raise EngineError(f"the block manager is broken: {what}.")

    def _find(self, tokens_key: bytes, kv_keys: Sequence[bytes]) -> Page | None:
        for page in self._shared.get(tokens_key, ()):
            if page.serves(kv_keys):
                return page
        return None

    def _evict(self) -> None:
        """Free the blocks of the page that has been without users for longest."""
        page, _ = self._idle.popitem(last=False)
        self._idle_blocks -= len(page.blocks)
        assert page.tokens_key is not None
        kept = self._shared[page.tokens_key]
        kept.remove(page)
        if not kept:
            del self._shared[page.tokens_key]
        self._free.extend(reversed(page.blocks))
        self.evicted_pages += 1
