"""Pages of a pool that stay whoever uses them: those that are here, and those yet to come.

It does not know why, or for how long.
"""

from collections import Counter
from collections.abc import Sequence

from cache.keys import Key
from cache.pages import PagePool


class PinsExceedBudget(Exception):
    """More pages are to be kept than there is room for."""


class PinnedPages:
    """An owner beside the requests, of up to `max_pages` pages of a pool."""

    def __init__(self, pool: PagePool, max_pages: int) -> None:
        self.max_pages = max(0, max_pages)
        self._pool = pool
        self._pins: Counter[Key] = Counter()
        self._pages: dict[Key, int] = {}
        """Those of them that are here: each has one owner more."""

    def __len__(self) -> int:
        """Pages that are to be kept."""
        return len(self._pins)

    def pin(self, keys: Sequence[Key]) -> None:
        """Keeps a sequence's pages, from its start on, once more; all or none (PinsExceedBudget).

        A page that has yet to come is kept from when it is `named`.
        """
        new = [key for key in keys if key not in self._pins]
        if new and len(self) + len(new) > self.max_pages:
            raise PinsExceedBudget(
                f"{len(new)} pages are to be kept on the device, {len(self)} already are, and "
                f"{self.max_pages} of its {self._pool.num_usable} can be, as the longest request "
                "needs the others; let something expire, raise cache.pages or set tiers.host_gib"
            )
        self._pins.update(keys)
        for key in new:
            page = self._pool.index.page_of(key)
            if page is not None:
                self._own(key, page)

    def unpin(self, keys: Sequence[Key]) -> None:
        """Undoes one `pin` of these pages."""
        released: list[int] = []
        for key in keys:
            assert key in self._pins, "a page is unpinned that was not pinned"
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                if key in self._pages:
                    released.append(self._pages.pop(key))
        self._pool.release(released)

    def named(self, key: Key) -> None:
        """The page of that name has come, or come back."""
        page = self._pool.index.page_of(key)
        if key in self._pins and key not in self._pages and page is not None:
            self._own(key, page)

    def let_go(self) -> None:
        """Owns no page any more, as all are to lose their names; what comes back is kept again."""
        self._pool.release(list(self._pages.values()))
        self._pages.clear()

    def _own(self, key: Key, page: int) -> None:
        self._pool.share([page])
        self._pages[key] = page
