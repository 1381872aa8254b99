"""Which blocks of keys and values a sequence has: block tables, shared prefixes, eviction.

A block is 16 positions of one layer. A page is 16 positions of a sequence: one block for each layer
that runs, so a sequence's memory is in proportion to its active layers. A full page stays in the
prefix cache after its sequences have ended, until its blocks are needed. Cached prefixes serve
sequences with the same tokens and the same sub-network, or a shallower one, which reads the first
layers; never a deeper one, as the layers above are missing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from elastic_moe_kernels.constants import BLOCK_POSITIONS
from numpy.typing import NDArray

from elastic_moe.errors import EngineError


@dataclass(slots=True, eq=False)
class Page:
    """Sixteen positions in all active layers.

    Attributes:
        blocks: one per active layer, in their order.
        users: sequences that have it.
        tokens_key: digest of all tokens up to its end, once it is in the prefix cache; else None.
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


class BlockTable:
    """The pages of one sequence. Its owner alone changes it: the block manager, or a runner's pool.

    Args:
        num_layers: L of the model.
        active_layers: of the sequence's sub-network.
        max_tokens: positions that it may have to hold.

    Attributes:
        pages: in the order of their positions.
        blocks: (L, B) int32 for kernels: entry [layer, i] is the block of positions 16i..16i+15,
            -1 for none.
        version: another number after every change.
    """

    __slots__ = ("_layers", "blocks", "pages", "version")

    def __init__(self, num_layers: int, active_layers: Sequence[int], max_tokens: int) -> None:
        self.pages: list[Page] = []
        self.blocks: NDArray[np.int32] = np.full(
            (num_layers, pages_for(max_tokens)), -1, dtype=np.int32
        )
        self.version = 0
        self._layers = np.array(active_layers, dtype=np.intp)

    @property
    def num_positions(self) -> int:
        """Positions that its pages hold."""
        return len(self.pages) * BLOCK_POSITIONS

    def append(self, page: Page) -> None:
        """Add a page; one of a deeper network has more blocks than layers run here."""
        self.blocks[self._layers, len(self.pages)] = page.blocks[: len(self._layers)]
        self.pages.append(page)
        self.version += 1

    def clear(self) -> None:
        """Remove all pages."""
        self.blocks.fill(-1)
        self.pages.clear()
        self.version += 1


def pages_for(tokens: int) -> int:
    """Pages that so many tokens fill or begin."""
    return -(-tokens // BLOCK_POSITIONS)


class BlockManager:
    """Allocates pages and owns the block tables of scheduled sequences. For one thread.

    Args:
        num_blocks: how many there are.
        prefix_caching: whether full pages stay in the prefix cache.
    """

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._shared: dict[bytes, list[Page]] = {}  # tokens_key -> pages in the prefix cache
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

    def grow(self, table: BlockTable, num_positions: int, depth: int) -> int:
        """Have a table hold so many positions, or as many as there are blocks for.

        Returns:
            How many positions it holds.
        """
        while table.num_positions < num_positions:
            page = self.allocate(depth)
            if page is None:
                break
            table.append(page)
        return table.num_positions

    def find_prefix(self, keys: Iterable[bytes], kv_keys: Sequence[bytes]) -> list[Page]:
        """The pages of the longest cached prefix; `share` them before anything else.

        Args:
            keys: digests of all tokens up to the end of each of the sequence's full pages.
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

    def share(self, pages: Iterable[Page], table: BlockTable) -> None:
        """Append cached pages to a table."""
        for page in pages:
            if not page.users:
                del self._idle[page]
                self._idle_blocks -= len(page.blocks)
            page.users += 1
            table.append(page)

    def free(self, table: BlockTable) -> None:
        """Release all pages of a table."""
        self.release(table.pages)
        table.clear()

    def release(self, pages: Sequence[Page]) -> None:
        """Take a user from each. The end of a sequence is evicted before its beginning."""
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
        """Add a full page to the prefix cache, unless one there serves as well."""
        if self.prefix_caching and self._find(tokens_key, kv_keys) is None:
            page.tokens_key, page.kv_keys = tokens_key, kv_keys
            self._shared.setdefault(tokens_key, []).append(page)

    def drop_idle(self) -> None:
        """Evict all pages without users."""
        while self._idle:
            self._evict()

    def check_integrity(self, held: Iterable[Sequence[Page]]) -> None:
        """Raise `EngineError` unless every block is in exactly one place.

        Args:
            held: the pages of every block table.
        """
        users = Counter(page for pages in held for page in pages)
        findable = [page for pages in self._shared.values() for page in pages]
        pages = {*users, *self._idle, *findable}
        blocks = [*self._free, *(block for page in pages for block in page.blocks)]
        for broken, what in (
            (sorted(blocks) != list(range(self.num_blocks)), "a block is lost or in two places"),
            (any(page.users != users[page] for page in pages), "a page counts its users wrongly"),
            (len(findable) != len(set(findable)), "a page is cached in two places"),
            (
                any(page.tokens_key != key for key, kept in self._shared.items() for page in kept),
                "a page is cached under another's key",
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
