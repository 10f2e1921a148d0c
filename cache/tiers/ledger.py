"""Which pages a tier holds within its budget, which of them goes first, and which may not go.

The least recently used goes first. What comes down from the device comes leaves first, and whoever
uses a sequence uses its leaves first (`use`), so a page goes before those it stands on; how dear a
page was to compute has already decided how long the device kept it. It does not know where pages
lie, and is guarded by its owner's lock.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from cache.events import Change, OnChange
from cache.keys import Key
from cache.pins import PinsExceedBudget


class Ledger:
    """Pages of one size; room is taken before a page comes, and given back after it is gone."""

    def __init__(self, tier: str, budget_bytes: int, page_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"the budget of tier {tier} is {budget_bytes} bytes; 0 is the least")
        self.tier, self.budget_bytes, self.page_bytes = tier, budget_bytes, page_bytes
        self.num_reserved = 0
        """Pages on their way in or out: they take room and are not held."""
        self._evictable: OrderedDict[Key, None] = OrderedDict()
        """Least recently used first."""
        self._kept: set[Key] = set()
        """Held and pinned."""
        self._pins: Counter[Key] = Counter()
        self._on_change: OnChange | None = None

    def __contains__(self, key: Key) -> bool:
        return key in self._evictable or key in self._kept

    def __len__(self) -> int:
        return len(self._evictable) + len(self._kept)

    @property
    def num_free(self) -> int:
        """Pages there is room for; below 0 after a start with a smaller budget."""
        return self.budget_bytes // self.page_bytes - len(self) - self.num_reserved

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    def keys(self) -> list[Key]:
        """Least recently used first; pinned ones last."""
        return [*self._evictable, *self._kept]

    def follow(self, on_change: OnChange) -> None:
        """Tells of the pages that are here, and from then on of each change."""
        assert self._on_change is None, "another follows"
        self._on_change = on_change
        on_change(Change.STORED, self.keys())

    def reserve(self) -> bool:
        """Takes room for a page, if there is any."""
        if self.num_free < 1:
            return False
        self.num_reserved += 1
        return True

    def release(self) -> None:
        """Gives reserved room back."""
        assert self.num_reserved > 0, "no room is reserved"
        self.num_reserved -= 1

    def enter(self, key: Key) -> None:
        """The page is here, in addition to what is reserved."""
        if key in self:
            return
        if key in self._pins:
            self._kept.add(key)
        else:
            self._evictable[key] = None
        self._tell(Change.STORED, [key])

    def leave(self, key: Key) -> bool:
        """The page is no longer to be found; its room stays reserved. Whether it was here."""
        if key in self._kept:
            self._kept.remove(key)
        elif key in self._evictable:
            del self._evictable[key]
        else:
            return False
        self.num_reserved += 1
        self._tell(Change.REMOVED, [key])
        return True

    def evict(self, most: int) -> list[Key]:
        """Up to `most` pages leave, the least recently used first; their room stays reserved."""
        keys = [
            self._evictable.popitem(last=False)[0] for _ in range(min(most, self.num_evictable))
        ]
        self.num_reserved += len(keys)
        self._tell(Change.REMOVED, keys)
        return keys

    def clear(self) -> list[Key]:
        """All pages that aren't pinned leave; their room stays reserved."""
        if self._kept:
            return self.evict(self.num_evictable)
        keys = list(self._evictable)
        self._evictable.clear()
        self.num_reserved += len(keys)
        self._tell(Change.CLEARED)
        return keys

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def use(self, keys: Sequence[Key]) -> None:
        """A sequence's pages, given from its start, were used."""
        for key in reversed(keys):
            if key in self._evictable:
                self._evictable.move_to_end(key)

    def is_pinned(self, key: Key) -> bool:
        return key in self._pins

    def pin(self, keys: Iterable[Key]) -> None:
        """Keeps the pages, here or yet to come, once more; all or none (PinsExceedBudget)."""
        keys = set(keys)
        num_new = sum(key not in self._pins for key in keys)
        num_bytes_over = (len(self._pins) + num_new) * self.page_bytes - self.budget_bytes
        if num_new and num_bytes_over > 0:
            raise PinsExceedBudget(
                f"{num_new} pages of {self.page_bytes} bytes are to be kept in tier {self.tier}, "
                f"{len(self._pins)} already are, and its budget is {self.budget_bytes}: "
                f"{num_bytes_over} bytes too many; raise the budget or let something expire"
            )
        for key in keys:
            self._pins[key] += 1
            if key in self._evictable:
                del self._evictable[key]
                self._kept.add(key)

    def unpin(self, keys: Iterable[Key]) -> None:
        """Undoes one `pin` of these pages."""
        for key in set(keys):
            assert key in self._pins, "a page is unpinned that was not pinned"
            self._pins[key] -= 1
            if self._pins[key]:
                continue
            del self._pins[key]
            if key in self._kept:
                self._kept.remove(key)
                self._evictable[key] = None

    def _tell(self, change: Change, keys: Sequence[Key] = ()) -> None:
        if self._on_change is not None:
            self._on_change(change, keys)
