"""Page tables: which pages hold each running request's tokens, as one NumPy array the step reads.

It does not know requests; a row of the table is whoever the scheduler put there.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache.pages import NULL_PAGE, OutOfPages, PagePool


class PageTables:
    """`num_rows` rows of up to `width` pages from one pool."""

    def __init__(self, pool: PagePool, num_rows: int, width: int) -> None:
        self.pool = pool
        self.width = width
        self.array: NDArray[np.int32] = np.full((num_rows, width), NULL_PAGE, np.int32)
        """[num_rows, width]; the free end of a row is the null page."""
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]

    def pages(self, row: int) -> Sequence[int]:
        return self._pages[row]

    def capacity(self, row: int) -> int:
        """Tokens the row's pages hold."""
        return len(self._pages[row]) * self.pool.page_size

    def missing(self, row: int, num_tokens: int) -> int:
        """Pages the row lacks to hold `num_tokens` tokens."""
        return max(0, self.pool.pages_for(num_tokens) - len(self._pages[row]))

    def grow(self, row: int, num_tokens: int) -> None:
        """Gives the row the pages to hold `num_tokens` tokens; all or none (OutOfPages)."""
        held = len(self._pages[row])
        missing = self.missing(row, num_tokens)
        if held + missing > self.width:
            raise OutOfPages(
                f"{num_tokens} tokens need {held + missing} pages, a row has {self.width}"
            )
        self._append(row, self.pool.allocate(missing))

    def adopt(self, row: int, pages: Sequence[int]) -> None:
        """Lets the empty `row` begin with `pages`, which hold a prefix that others computed."""
        assert not self._pages[row], f"row {row} still has pages"
        self.pool.index.use(pages)
        self.pool.share(pages)
        self._append(row, pages)

    def replace(self, row: int, number: int, page: int) -> None:
        """Lets the row have `page`, which has a name and holds the same tokens, in place of its
        own, and before it what `page` stands on.

        That is what the row holds already, but for pages that lost their names in a flush.
        """
        held = self._pages[row]
        while held[number] != page:
            self.pool.share([page])
            self.pool.release([held[number]])
            held[number] = self.array[row, number] = page
            if number == 0:
                break
            number, page = number - 1, self.pool.index.parent(page)

    def free(self, row: int) -> None:
        """Gives the row's pages back."""
        self.pool.release(self._pages[row])
        self._pages[row] = []
        self.array[row] = NULL_PAGE

    def _append(self, row: int, pages: Sequence[int]) -> None:
        held = self._pages[row]
        self.array[row, len(held) : len(held) + len(pages)] = pages
        held.extend(pages)
