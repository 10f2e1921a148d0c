"""Which pages of a pool hold which prefixes: pages found by name, in a tree.

A page stays while a longer prefix that needs it does, so what is here of a sequence is always a
beginning of it. It does not know who owns a page (`cache/pages.py`), or what lies below the device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cache.events import Change, OnChange
from cache.eviction import EvictionOrder
from cache.keys import KEY_BYTES, TOKEN_BYTES, Key, PageNames, page_key

ROOT = 0
"""The parent of first pages: the null page, which has no name."""


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
        # What is known of a page is spread over lists: objects would take three times as long.
        self._key: list[Key | None] = [None] * num_pages
        """Its name, if it has one; what follows counts only then."""
        self._parent = [ROOT] * num_pages
        self._block: list[bytes] = [b""] * num_pages
        """Its token ids: fewer than fill it where a sequence ended."""
        self._start: list[bytes] = [b""] * num_pages
        """Its parent's name and its first token."""
        self._num_children = [0] * num_pages
        self._is_idle = [False] * num_pages
        """Nobody owns it."""
        self._starts: dict[bytes, int] = {}
        """Of pages that start alike, the one that came last."""
        self._unwritten: list[int] = []
        """Pages that the step being planned will write."""
        self._order = EvictionOrder(num_pages, page_size, cost)
        self._full_bytes = page_size * TOKEN_BYTES
        self._on_change: OnChange | None = None
        self._gone: list[Key] = []
        """Names taken that it has yet to be told of."""

    def __len__(self) -> int:
        """Named pages."""
        return len(self._page_of)

    def follow(self, on_change: OnChange) -> None:
        """Tells of the full pages that have names, and from then on of each change."""
        assert self._on_change is None, "another follows"
        self._on_change = on_change
        full = [(key, page) for key, page in self._page_of.items() if self._is_full(page)]
        parents = [self._start[page][:KEY_BYTES] for _, page in full]
        on_change(Change.STORED, [key for key, _ in full], parents)

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

    def page_of(self, key: Key) -> int | None:
        """The page of that name."""
        return self._page_of.get(key)

    def parent(self, page: int) -> int:
        """The page that the named `page` stands on, or ROOT."""
        return self._parent[page]

    def find_start(self, parent: Key, block: bytes) -> Start:
        """A page after `parent` that begins as `block` does."""
        page = self._starts.get(parent + block[:TOKEN_BYTES])
        if page is None:
            return Start(ROOT, 0, 0)
        there = self._block[page]
        return Start(page, _num_shared(there, block), len(there) // TOKEN_BYTES)

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
        parent_key = names.parent(number)
        if self._insert(page, key, names.blocks[number], parent, parent_key, number):
            self._unwritten.append(page)
            if self._on_change is not None:
                self._on_change(Change.STORED, (key,), (parent_key,))
        return page

    def add_end(self, names: PageNames, number: int, page: int, parent: int, block: bytes) -> None:
        """Remembers the page, not full, in which a sequence ended, and which has been written."""
        parent_key = names.parent(number)
        key = page_key(parent_key, block)
        if key not in self._page_of and self._insert(page, key, block, parent, parent_key, number):
            self._starts[self._start[page]] = page

    def written(self) -> None:
        """The pages named so far are written before any later step: they may be copied."""
        for page in self._unwritten:
            if self._key[page] is not None:
                self._starts[self._start[page]] = page
        self._unwritten.clear()

    def use(self, pages: Sequence[int]) -> None:
        """The pages were asked for, and are about to have one more owner."""
        self._order.use(pages)

    def own(self, pages: Sequence[int]) -> None:
        """Idle pages have an owner again."""
        is_idle = self._is_idle
        for page in pages:
            assert is_idle[page], f"page {page} is shared but has no owner and no name"
            is_idle[page] = False
        self.num_idle -= len(pages)
        self._order.leave(pages)

    def disown(self, pages: Iterable[int]) -> list[int]:
        """Keeps those of `pages`, which have no owner any more, that have a name; returns the
        others."""
        keys, num_children, is_idle = self._key, self._num_children, self._is_idle
        nameless: list[int] = []
        num_idle = 0
        for page in pages:
            if keys[page] is None:
                nameless.append(page)
                continue
            is_idle[page] = True
            num_idle += 1
            if not num_children[page]:
                self._order.wait(page)
        self.num_idle += num_idle
        return nameless

    def evict(self, count: int) -> list[int]:
        """Takes the names of the `count` idle pages that are the least to lose. There must be so
        many."""
        evicted: list[int] = []
        above = ROOT
        while len(evicted) < count:
            if above and self._order.evict_next(above, evicted[-1]):
                page = above
            else:
                page = self._order.evict()
            evicted.append(page)
            above = self._forget(page)
        if above:
            self._order.wait(above)
        if self._on_change is not None and self._gone:
            self._on_change(Change.REMOVED, self._gone)
            self._gone.clear()
        return evicted

    def clear(self) -> list[int]:
        """Takes all names; returns the pages that were idle, which are the caller's to free."""
        idle = [page for page, is_idle in enumerate(self._is_idle) if is_idle]
        self._order.leave(idle)
        self._key = [None] * len(self._key)
        self._num_children = [0] * len(self._num_children)
        self._is_idle = [False] * len(self._is_idle)
        self._page_of.clear()
        self._starts.clear()
        self._unwritten.clear()
        self.num_idle = 0
        if self._on_change is not None:
            self._on_change(Change.CLEARED)
        return idle

    def _insert(
        self, page: int, key: Key, block: bytes, parent: int, parent_key: Key, depth: int
    ) -> bool:
        """Whether the page could be given its name."""
        if parent != ROOT:
            if self._key[parent] != parent_key:
                return False
            self._num_children[parent] += 1
        self._key[page] = key
        self._parent[page] = parent
        self._block[page] = block
        self._start[page] = parent_key + block[:TOKEN_BYTES]
        self._page_of[key] = page
        self._order.begin(page, depth)
        return True

    def _is_full(self, page: int) -> bool:
        return len(self._block[page]) == self._full_bytes

    def _forget(self, page: int) -> int:
        """Takes the name of an idle page; returns its parent, if that may go now, or ROOT."""
        key, parent = self._key[page], self._parent[page]
        assert key is not None, "a page that waits has a name"
        self.num_idle -= 1
        self._is_idle[page] = False
        self._key[page] = None
        del self._page_of[key]
        if self._on_change is not None and self._is_full(page):
            self._gone.append(key)
        start = self._start[page]
        last = self._starts.pop(start, page)
        if last != page:
            self._starts[start] = last
        if parent == ROOT:
            return ROOT
        self._num_children[parent] -= 1
        return parent if self._is_idle[parent] and not self._num_children[parent] else ROOT


def _num_shared(a: bytes, b: bytes) -> int:
    """Tokens that both begin with."""
    least = min(len(a), len(b))
    differing = int.from_bytes(a[:least], "little") ^ int.from_bytes(b[:least], "little")
    if not differing:
        return least // TOKEN_BYTES
    return ((differing & -differing).bit_length() - 1) // (8 * TOKEN_BYTES)
