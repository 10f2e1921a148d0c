"""Which pages of the preallocated KV cache are free, and how many owners each of the others has.

A page without owners is kept while its name may be asked for again (`cache/prefix_index.py`) and
room is not needed. It does not know requests or tokens; a page is a number.
"""

from collections.abc import Callable, Sequence

from cache.prefix_index import PrefixIndex

NULL_PAGE = 0
"""Takes the writes of padding rows; never handed out."""


class OutOfPages(Exception):
    """More pages were asked for than are free."""


class PagePool:
    """Reference-counted pages `1 .. num_pages - 1`; page 0 is reserved for padding."""

    def __init__(
        self, num_pages: int, page_size: int, cost: Callable[[int], float] = lambda position: 1.0
    ) -> None:
        """`cost` is what computing the token at a position takes, in any unit."""
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages has none to hand out; 2 is the least")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be 1 or more")
        self.num_pages = num_pages
        self.page_size = page_size
        self.index = PrefixIndex(num_pages, page_size, cost)
        self._references = [0] * num_pages
        # A stack: the page freed last is handed out first, while it may still be in a cache.
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out in all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now: some of them may be kept until then."""
        return len(self._free) + self.index.num_idle

    @property
    def num_used(self) -> int:
        """Pages that have owners."""
        return self.num_usable - self.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each, nameless; all or none (OutOfPages)."""
        if count > self.num_free:
            raise OutOfPages(f"{count} pages asked for, {self.num_free} are free")
        free = self._free
        pages = [free.pop() for _ in range(min(count, len(free)))]
        pages += self.index.evict(count - len(pages))
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds an owner to each of `pages`, which have owners or are kept."""
        references = self._references
        self.index.own([page for page in pages if not references[page]])
        for page in pages:
            references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes an owner from each of `pages`, given from a sequence's start.

        A page without owners is kept if it has a name, or else free.
        """
        references = self._references
        ownerless: list[int] = []
        for page in reversed(pages):
            assert references[page] > 0, f"page {page} is released but has no owner"
            references[page] -= 1
            if not references[page]:
                ownerless.append(page)
        self._free += self.index.disown(ownerless)

    def flush(self) -> int:
        """Forgets what pages hold; returns how many were kept for it and are free now."""
        idle = self.index.clear()
        self._free.extend(idle)
        return len(idle)

    def num_owners(self, page: int) -> int:
        return self._references[page]
