"""Pages between a replica's devices and the tiers below them.

It does not know requests, or why a page is saved or wanted.
"""

from collections.abc import Buffer, Callable, Sequence
from itertools import accumulate
from threading import Lock

from cache.keys import Key
from cache.tiers.counts import TierReport
from cache.tiers.fetch import Fetch
from cache.tiers.stack import TierStack
from model.step import State
from serve.page_images import BATCHES
from serve.page_mover import PageMover

MOST_SAVED = 2 * BATCHES[-1]
"""Pages that a step may save: they lie on the device once more until the host has them."""
MOST_UNDER_WAY = 4 * MOST_SAVED
"""Pages that are being read and have not been kept yet, with those that fill a batch."""


class TierTraffic:
    """What a scheduler (`serve.prefixes.Tiers`) and a runner need of tiers."""

    def __init__(
        self,
        stack: TierStack,
        mover: PageMover,
        page_cost: Callable[[int], float],
    ) -> None:
        """`page_cost` is what computing a sequence's page of a number costs, in the scheduler's
        units."""
        self._stack, self._mover, self._page_cost = stack, mover, page_cost
        self._wake: Callable[[], None] = lambda: None
        self._num_under_way = 0
        self._lock = Lock()
        """Guards it."""

    def start(self, wake: Callable[[], None]) -> None:
        """`wake` is called when pages have arrived, from another thread."""
        self._wake = wake
        self._stack.start()

    @property
    def num_savable(self) -> int:
        """Pages that the next step may save."""
        room = MOST_UNDER_WAY - self._num_under_way
        few, many = BATCHES
        return min(MOST_SAVED, room - room % many if room >= many else min(room, few))

    def use(self, keys: Sequence[Key]) -> None:
        self._stack.use(keys)

    def holds(self, key: Key) -> bool:
        return not self._stack.lacks(key)

    def budgets(self) -> dict[str, int]:
        return {
            report.name: report.budget_bytes // report.page_bytes
            for report in self._stack.reports()
        }

    def pin(self, tier: str, keys: Sequence[Key]) -> list[Key]:
        return self._stack.pin(tier, keys)

    def unpin(self, tier: str, keys: Sequence[Key]) -> None:
        self._stack.unpin(tier, keys)

    def fetch(self, keys: Sequence[Key], number: int) -> Fetch | None:
        """Brings the pages, from a sequence's page `number` on, if that is the faster way."""
        keys = keys[: len(self._stack.find(keys))]
        if not keys:
            return None
        costs = accumulate(self._page_cost(number + i) for i in range(len(keys)))
        landing_s = self._mover.landing_s
        computing_s = self._stack.worth.recompute_s(list(costs))
        saved_s = [seconds - (i + 1) * landing_s for i, seconds in enumerate(computing_s)]
        return self._stack.fetch(keys, saved_s, self._wake) if saved_s[-1] > 0 else None

    def observe_prefill(self, cost: float, seconds: float) -> None:
        self._stack.worth.observe_prefill(cost, seconds)

    def save(self, state: State, saves: Sequence[tuple[Key, int]]) -> None:
        """Starts to read pages as they are after the steps submitted so far, for the tiers."""
        if not saves:
            return
        keys, pages = zip(*saves, strict=True)
        num_read = _num_read(len(saves))
        with self._lock:
            self._num_under_way += num_read
        num_cleared = self._stack.num_cleared
        self._mover.read(state, pages, lambda images: self._keep(keys, images, num_cleared))

    def reports(self) -> list[TierReport]:
        return self._stack.reports()

    def clear(self) -> None:
        """Lets the tiers forget what isn't pinned, what `save` is reading included."""
        self._stack.clear()

    def await_cleared(self, timeout_s: float) -> None:
        """Waits until nothing that was cleared is left in a store."""
        self._stack.await_cleared(timeout_s)

    def close(self, grace_s: float) -> None:
        """Keeps what has been read, for up to `grace_s` as far as stores are slow."""
        self._stack.close(grace_s)

    def _keep(self, keys: Sequence[Key], images: Sequence[Buffer], num_cleared: int) -> None:
        try:
            for key, image in zip(keys, images, strict=False):
                self._stack.store(key, image, num_cleared)
        finally:
            with self._lock:
                self._num_under_way -= _num_read(len(keys))
            self._wake()


def _num_read(num_pages: int) -> int:
    """Pages that are read for so many, in whole batches."""
    whole, rest = divmod(num_pages, BATCHES[-1])
    return whole * BATCHES[-1] + next((batch for batch in BATCHES if 0 < rest <= batch), 0)
