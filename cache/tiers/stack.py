"""The tiers below the device, as the engine uses them.

It does not know requests, device pages or how an image is made.
"""

import logging
import time
from collections.abc import Buffer, Callable, Sequence
from itertools import groupby
from math import inf
from threading import Lock

from cache.keys import Key
from cache.tiers.counts import Decisions, Miss, TierReport
from cache.tiers.fetch import Fetch
from cache.tiers.host import HostTier
from cache.tiers.pump import Pump
from cache.tiers.store import StoreTier
from cache.tiers.worth import LARGEST, MOST_LOST, Worth

log = logging.getLogger("weft")

PROBE_S = 10.0
"""Nobody waits for a probe."""
FIRST_PROBE = 32
"""Pages, read when a store has been listed."""


class TierStack:
    """Host memory above stores, nearest first. `start` it before use."""

    def __init__(
        self,
        host: HostTier,
        stores: Sequence[StoreTier],
        *,
        write_through: bool = False,
        most_lost: float = MOST_LOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """With `write_through` a page goes to the stores at once, else when host memory lets go.

        `most_lost` is how much of what computing takes a fetch may cost that is given up: a tier
        whose first page takes longer is not used.
        """
        names = [host.name, *(store.name for store in stores)]
        if len(set(names)) < len(names):
            raise ValueError(f"tiers are called {names}; each needs a name of its own")
        self.worth = Worth(most_lost)
        self._host, self._stores = host, {store.name: store for store in stores}
        self._write_through, self._clock = write_through, clock
        self._decisions = {name: Decisions() for name in names}
        self._probes: dict[str, Fetch] = {}
        """Under way, one for each tier."""
        self._lock = Lock()
        """Guards decisions and probes."""
        self.num_cleared = 0
        """How often: what comes after a clearing and began before it is not kept (`store`)."""
        self._let_go: list[Buffer] = []
        """Images that were cleared and have yet to be freed."""
        self._moving = Lock()
        """Guards both, and is held while pages move down: none is between two tiers when they are
        cleared."""
        self._pump = Pump(self._stores, self._arrived, self._ended, clock)

    def start(self) -> None:
        """Stores are listed in the background, and then read a little, to know what they take."""
        self._pump.start()
        for store in self._stores.values():
            store.start(lambda store=store: self._probe(store.name, store.newest(FIRST_PROBE)))

    def find(self, keys: Sequence[Key], first: int = 0) -> list[str]:
        """The tier of each page from number `first` on, up to the first that no tier has."""
        tiers = [self._host, *self._stores.values()]
        found: list[str] = []
        for key in keys[first:]:
            for tier in tiers:
                if tier.holds(key):
                    found.append(tier.name)
                    break
            else:
                break
        return found

    def fetch(
        self, keys: Sequence[Key], recompute_s: Sequence[float], wake: Callable[[], None]
    ) -> Fetch | None:
        """Brings the beginning of `keys` that is faster to fetch than to compute; None without.

        The keys are those of a sequence after what the device has; `recompute_s[i]` is what
        computing `keys[: i + 1]` would take, less what putting them on the device takes. A `Fetch`
        may be done at once; otherwise `wake` is called from another thread when it is, unless it
        was cancelled.
        """
        assert len(keys) == len(recompute_s), "each key has its time"
        found = self._worth_fetching(keys, self.find(keys), recompute_s)
        if not found:
            return None
        num_pages, now_s = len(found), self._clock()
        most_lost_s = self.worth.most_lost * recompute_s[num_pages - 1]
        keys, recompute_s = keys[:num_pages], recompute_s[:num_pages]
        fetch = Fetch(keys, found, recompute_s, now_s, most_lost_s, wake, self.num_cleared)
        for number, (key, tier) in enumerate(zip(keys, found, strict=True)):
            if tier == self._host.name:
                image = self._host.get(key)
                fetch.accept(number, Miss.ABSENT if image is None else image, now_s)
        if fetch.done():
            self.use(keys)
        else:
            self._pump.begin(fetch)
        return fetch

    def store(self, key: Key, image: Buffer, num_cleared: int | None = None) -> None:
        """Keeps a page that has been computed, and does not wait for it. If it was read when they
        had been cleared only `num_cleared` times, it is kept where it is pinned."""
        with self._moving:
            is_cleared = num_cleared not in (None, self.num_cleared)
            for store in self._stores.values():
                if store.is_pinned(key) or (self._write_through and not is_cleared):
                    store.write(key, image)
            if self._host.is_pinned(key) or not is_cleared:
                self._put_in_host(key, image)

    def use(self, keys: Sequence[Key]) -> None:
        """A sequence's pages, given from its start, were used, be it only on the device."""
        self._host.use(keys)
        for store in self._stores.values():
            store.use(keys)

    def lacks(self, key: Key) -> bool:
        """Whether the page is to be stored: it is nowhere, or not where it is pinned."""
        tiers = [self._host, *self._stores.values()]
        missing = [tier for tier in tiers if not tier.holds(key)]
        return len(missing) == len(tiers) or any(tier.is_pinned(key) for tier in missing)

    def pin(self, tier: str, keys: Sequence[Key]) -> list[Key]:
        """Keeps pages in a tier until `unpin`; returns those that it has yet to be given (`store`).

        Raises PinsExceedBudget, and then keeps none of them.
        """
        home = self._tier(tier)
        home.pin(keys)
        missing = [key for key in keys if not home.holds(key)]
        if isinstance(home, HostTier):
            return missing
        for key in missing:
            image = self._host.peek(key)
            if image is not None:
                home.write(key, image)
        return [key for key in missing if not home.holds(key)]

    def unpin(self, tier: str, keys: Sequence[Key]) -> None:
        """Undoes one `pin` of these pages."""
        self._tier(tier).unpin(keys)

    def clear(self) -> None:
        """Forgets all pages that aren't pinned, those on their way down included. Who has a fetch
        under way cancels it; `await_cleared` says when nothing of them is left."""
        with self._moving:
            self.num_cleared += 1
            self._let_go += self._host.clear()
            for store in self._stores.values():
                store.clear()

    def await_cleared(self, timeout_s: float) -> None:
        """Waits until the stores have deleted what was cleared, too: what they could not may be
        found by the next start."""
        with self._moving:
            let_go, self._let_go = self._let_go, []
        # One by one, so that other threads may go on meanwhile.
        while let_go:
            let_go.pop()
        end_s = time.monotonic() + timeout_s
        for store in self._stores.values():
            if not store.await_cleared(max(0.0, end_s - time.monotonic())):
                log.warning(
                    "tier %s still has pages that were flushed: it deletes them when it can, and "
                    "finds them again if it is started before",
                    store.name,
                )

    def reports(self) -> list[TierReport]:
        """Of each tier, nearest first."""
        with self._lock:
            decisions = {
                name: Decisions(**vars(counted)) for name, counted in self._decisions.items()
            }
        tiers = [self._host, *self._stores.values()]
        return [tier.report(decisions[tier.name]) for tier in tiers]

    def close(self, grace_s: float) -> None:
        """Abandons fetches; stores write what is queued, and what only host memory has, for up to
        `grace_s`."""
        self._pump.close(grace_s)
        stores = self._stores.values()
        for store in stores:
            store.stop(grace_s, self._host.newest_first())
        for store in stores:
            store.join()

    def _tier(self, name: str) -> HostTier | StoreTier:
        if name == self._host.name:
            return self._host
        if name not in self._stores:
            raise ValueError(
                f"there is no tier {name}; there are {', '.join([self._host.name, *self._stores])}"
            )
        return self._stores[name]

    def _worth_fetching(
        self, keys: Sequence[Key], found: list[str], recompute_s: Sequence[float]
    ) -> list[str]:
        """The beginning of `found` of which each tier's part is faster to fetch than to compute."""
        num_taken = 0
        for tier, run in groupby(found):
            end = num_taken + sum(1 for _ in run)
            alone_s = recompute_s[end - 1] - (recompute_s[num_taken - 1] if num_taken else 0.0)
            # Host memory is there at once; the way from it to the device is the caller's.
            wins = tier == self._host.name or self.worth.decide(end - num_taken, tier, alone_s)
            with self._lock:
                if wins:
                    self._decisions[tier].fetched += 1
                else:
                    self._decisions[tier].recomputed += 1
            if not wins:
                if self.worth.probe_due(tier):
                    self._probe(tier, keys[num_taken : min(end, num_taken + LARGEST)])
                break
            num_taken = end
        return found[:num_taken]

    def _probe(self, tier: str, keys: Sequence[Key]) -> None:
        """Reads pages that nobody waits for, unless a probe of the tier is under way."""
        with self._lock:
            if not keys or tier in self._probes:
                return
            tiers, no_s = [tier] * len(keys), [0.0] * len(keys)
            fetch = Fetch(keys, tiers, no_s, self._clock(), PROBE_S)
            self._probes[tier] = fetch
            self._decisions[tier].probed += 1
        self._pump.begin(fetch)

    def _arrived(self, fetch: Fetch, number: int, image: Buffer) -> None:
        """Who asks next for a page that came up finds it nearer."""
        if self._is_probe(fetch):
            return
        with self._moving:
            if fetch.num_cleared == self.num_cleared:
                self._put_in_host(fetch.keys[number], image)

    def _is_probe(self, fetch: Fetch) -> bool:
        return self._probes.get(fetch.tiers[-1]) is fetch

    def _ended(self, fetch: Fetch) -> None:
        """Learns from a fetch. Called from the pump's thread."""
        slow = fetch.tiers[fetch.num_arrived] if fetch.is_abandoned else None
        with self._lock:
            if self._is_probe(fetch):
                del self._probes[fetch.tiers[-1]]
            elif slow is not None:
                self._decisions[slow].abandoned += 1
        for tier, span in fetch.spans.items():
            took_s = [arrived_s - span.started_s for arrived_s in span.arrived_s]
            if tier == slow:
                first_s = took_s[0] if took_s else inf
                self.worth.observe_fetch(tier, fetch.tiers.count(tier), first_s, inf)
            elif took_s:
                self.worth.observe_fetch(tier, len(took_s), took_s[0], took_s[-1])
        self.use(fetch.keys[: fetch.num_arrived])

    def _put_in_host(self, key: Key, image: Buffer) -> None:
        """What has to leave for it goes down. Called with `_moving` held."""
        for gone, its_image in self._host.put(key, image):
            for store in self._stores.values():
                store.write(gone, its_image)
