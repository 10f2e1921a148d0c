"""Which pages of a pool hold which prefixes: pages found by name, in a tree.

A page stays while a longer prefix that needs it does, so what is here of a sequence is always a
beginning of it. It does not know who owns a page (`cache/pages.py`), or what lies below the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache.eviction import EvictionOrder
from cache.keys import TOKEN_BYTES, Key, PageNames, page_key

ROOT = 0
"""The parent of first pages: the null page, which has no name."""


@dataclass(slots=True)
class _Node:
    """A named page."""

    key: Key
    parent_key: Key
    parent: int
    block: bytes
    """Its token ids: fewer than fill it where a sequence ended."""
    num_children: int = 0
    is_idle: bool = False
    """Nobody owns it."""


class Start(NamedTuple):
    """A page that begins with tokens that are asked for."""

    page: int
    num_shared: int
    """Of those tokens; 0 where there is no such page."""
    num_tokens: int
    """In the page."""


class PrefixIndex:
    """Names of pages, and which of them goes first when room is needed.

    Whoever owns a named page owns those it stands on, so the idle ones can all go, leaves first.
    """

    def __init__(
        self, num_pages: int, page_size: int, cost: Callable[[int], float] = lambda position: 1.0
    ) -> None:
        """`cost` is what computing the token at a position takes, in any unit."""
        self.num_idle = 0
        """Named pages that nobody owns."""
        self._page_of: dict[Key, int] = {}
        self._nodes: list[_Node | None] = [None] * num_pages
        self._starts: dict[tuple[Key, bytes], int] = {}
        """By the parent's name and the first token, the page that came last."""
        self._unwritten: list[int] = []
        """Pages that the step being planned will write."""
        self._order = EvictionOrder(num_pages, page_size, cost)

    def __len__(self) -> int:
        """Named pages."""
        return len(self._page_of)

    def find(self, keys: Sequence[Key], first: int, last: int) -> int:
        """How many pages of a sequence are here, up to `last`; the first `first` are known."""
        page_of = self._page_of
        while first < last:
            middle = (first + last + 1) // 2
            if keys[middle - 1] in page_of:
                first = middle
            else:
                last = middle - 1
        return first

    def pages(self, keys: Sequence[Key]) -> list[int]:
        """The pages of those names, all of which are here."""
        page_of = self._page_of
        return [page_of[key] for key in keys]

    def find_start(self, parent: Key, block: bytes) -> Start:
        """A page after `parent` that begins as `block` does."""
        page = self._starts.get((parent, block[:TOKEN_BYTES]), ROOT)
        node = self._nodes[page]
        if node is None:
            return Start(ROOT, 0, 0)
        return Start(page, _num_shared(node.block, block), len(node.block) // TOKEN_BYTES)

    def add(self, names: PageNames, number: int, page: int, parent: int) -> int:
        """Gives `page`, number `number` of a sequence, its name; returns the page that has the
        name, which is another if that came first.

        The sequence holds `parent`, its page before, and is to hold what is returned. Where
        `parent` has lost its name, `page` is given none.
        """
        key = names.keys[number]
        known = self._page_of.get(key)
        if known is not None:
            return known
        node = _Node(key, names.parent(number), parent, names.blocks[number])
        if self._insert(node, page, number):
            self._unwritten.append(page)
        return page

    def add_end(self, names: PageNames, number: int, page: int, parent: int, block: bytes) -> None:
        """Remembers the page, not full, in which a sequence ended, and which has been written."""
        parent_key = names.parent(number)
        key = page_key(parent_key, block)
        if key not in self._page_of and self._insert(
            _Node(key, parent_key, parent, block), page, number
        ):
            self._starts[parent_key, block[:TOKEN_BYTES]] = page

    def written(self) -> None:
        """The pages named so far are written before any later step: they may be copied."""
        for page in self._unwritten:
            if node := self._nodes[page]:
                self._starts[node.parent_key, node.block[:TOKEN_BYTES]] = page
        self._unwritten.clear()

    def use(self, pages: Sequence[int]) -> None:
        """The pages were asked for, and are about to have one more owner."""
        for page in pages:
            self._order.use(page)

    def own(self, page: int) -> None:
        """An idle page has an owner again."""
        node = self._nodes[page]
        assert node is not None, f"page {page} is shared but has no owner and no name"
        node.is_idle = False
        self.num_idle -= 1
        self._order.leave(page)

    def disown(self, page: int) -> bool:
        """Whether a page without owners is kept for its name."""
        node = self._nodes[page]
        if node is None:
            return False
        node.is_idle = True
        self.num_idle += 1
        if not node.num_children:
            self._order.wait(page)
        return True

    def evict(self) -> int:
        """Takes the name of the idle page that is the least to lose. There must be one."""
        page = self._order.evict()
        self._forget(page)
        return page

    def clear(self) -> list[int]:
        """Takes all names; returns the pages that were idle, which are the caller's to free."""
        idle = [page for page, node in enumerate(self._nodes) if node and node.is_idle]
        for page in idle:
            self._order.leave(page)
        self._nodes = [None] * len(self._nodes)
        self._page_of.clear()
        self._starts.clear()
        self.num_idle = 0
        return idle

    def _insert(self, node: _Node, page: int, depth: int) -> bool:
        """Whether the page could be given its name."""
        if node.parent != ROOT:
            above = self._nodes[node.parent]
            if above is None or above.key != node.parent_key:
                return False
            above.num_children += 1
        self._nodes[page] = node
        self._page_of[node.key] = page
        self._order.begin(page, depth)
        return True

    def _forget(self, page: int) -> None:
        node = self._nodes[page]
        assert node is not None, "a page that waits has a name"
        self.num_idle -= 1
        self._nodes[page] = None
        del self._page_of[node.key]
        start = (node.parent_key, node.block[:TOKEN_BYTES])
        if self._starts.get(start) == page:
            del self._starts[start]
        above = self._nodes[node.parent]
        if above is not None:
            above.num_children -= 1
            if above.is_idle and not above.num_children:
                self._order.wait(node.parent)


def _num_shared(a: bytes, b: bytes) -> int:
    """Tokens that both begin with."""
    least = min(len(a), len(b))
    differing = int.from_bytes(a[:least], "little") ^ int.from_bytes(b[:least], "little")
    if not differing:
        return least // TOKEN_BYTES
    return ((differing & -differing).bit_length() - 1) // (8 * TOKEN_BYTES)
