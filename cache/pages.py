"""Which pages of the preallocated KV cache are free, and how many owners each of the others has.

It does not know requests or tokens; a page is a number.
"""

from collections.abc import Iterable, Sequence

NULL_PAGE = 0
"""Takes the writes of padding rows; never handed out."""


class OutOfPages(Exception):
    """More pages were asked for than are free."""


class PagePool:
    """Reference-counted pages `1 .. num_pages - 1`; page 0 is reserved for padding."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages has none to hand out; 2 is the least")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be 1 or more")
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        # A stack: the page freed last is handed out first, while it may still be in a cache.
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out in all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each; all or none (OutOfPages)."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds an owner to each of `pages`."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is shared but has no owner"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes an owner from each of `pages`; a page without owners is free."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is released but has no owner"
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def num_owners(self, page: int) -> int:
        return self._references[page]
