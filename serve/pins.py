"""Where pages are kept whoever uses them: on the device, or in a tier below it.

It does not know for how long, or whose they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cache.keys import Key, PageNames
from cache.pins import PinsExceedBudget
from cache.retention import Retained, Retention
from serve.prefixes import Prefixes, Tiers


class Pins(Protocol):
    """Keeps pages, there or yet to come."""

    @property
    def max_pages(self) -> int: ...

    def pin(self, keys: Sequence[Key]) -> None:
        """Of a sequence, from its start on; all or none (PinsExceedBudget)."""
        ...

    def unpin(self, keys: Sequence[Key]) -> None:
        """Undoes one `pin` of these pages."""
        ...


class Homes(NamedTuple):
    contexts: Pins
    retained: Pins


def homes(prefixes: Prefixes) -> Homes:
    """Contexts are kept in the lowest tier, which may survive a restart; what requests want kept,
    in the nearest. Without tiers both are kept on the device."""
    if prefixes.tiers is None:
        return Homes(prefixes.pinned, prefixes.pinned)
    budgets = prefixes.tiers.budgets()
    below = [TierPins(prefixes, prefixes.tiers, *budget) for budget in budgets.items()]
    return Homes(below[-1], below[0])


@dataclass(frozen=True)
class TierPins:
    prefixes: Prefixes
    tiers: Tiers
    tier: str
    max_pages: int

    def pin(self, keys: Sequence[Key]) -> None:
        # What the device has already would not be saved again.
        self.prefixes.save(self.tiers.pin(self.tier, keys))

    def unpin(self, keys: Sequence[Key]) -> None:
        self.tiers.unpin(self.tier, keys)


class RetainedCounts(NamedTuple):
    num_pages: int
    num_refused: int
    """Pages that there was no room for, since the start."""


class RetainedPages:
    """What requests asked to be kept, for as long as they did."""

    def __init__(self, pins: Pins, page_size: int) -> None:
        self._pins, self._page_size = pins, page_size
        # The other half is for contexts: what was promised goes before what was wished for.
        self._retained = Retained(pins.max_pages // 2)

    def __len__(self) -> int:
        return len(self._retained)

    @property
    def counts(self) -> RetainedCounts:
        return RetainedCounts(len(self._retained), self._retained.num_refused)

    def submitted(self, names: PageNames, keep: Retention | None, now_s: float) -> None:
        """A request has come: what it asks to be kept is, and what it uses begins anew."""
        if self._retained:
            self.expire(now_s)
            self._retained.use(names.keys, now_s)
        if keep is None:
            return
        new = self._retained.keep(names.keys, keep.page_ttls_s(self._page_size), now_s)
        try:
            self._pins.pin(new)
        except PinsExceedBudget:
            self._retained.refuse(new)

    def expire(self, now_s: float) -> None:
        """Lets go what nobody has used for its time."""
        if over := self._retained.expire(now_s):
            self._pins.unpin(over)
