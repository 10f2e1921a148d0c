"""The thread that asks stores for pages, hands them to fetches, and gives late fetches up.

It does not know what is worth fetching or what becomes of it.
"""

import logging
import time
from collections.abc import Buffer, Callable, Mapping
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

from cache.tiers.counts import Miss
from cache.tiers.fetch import Fetch
from cache.tiers.store import StoreTier

log = logging.getLogger("weft")


class Pump:
    """Drives fetches: calls `arrived` for each page, also a late one, and `ended` at the end."""

    def __init__(
        self,
        tiers: Mapping[str, StoreTier],
        arrived: Callable[[Fetch, int, Buffer], None],
        ended: Callable[[Fetch], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tiers, self._clock = tiers, clock
        self._arrived, self._ended = arrived, ended
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What the thread is to do; it alone touches fetches that are not done."""
        self._fetches: set[Fetch] = set()
        self._is_closed = False
        self._thread = Thread(target=self._run, name="weft-tiers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self, fetch: Fetch) -> None:
        self._inbox.put(partial(self._begin, fetch))

    def close(self, grace_s: float) -> None:
        """Abandons what is under way."""
        self._inbox.put(self._stop)
        if self._thread.ident is not None:
            self._thread.join(grace_s)

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._turn()
            except Exception:
                log.exception("a step of fetching pages from tiers failed")

    def _turn(self) -> None:
        first_s = min((fetch.give_up_at_s for fetch in self._fetches), default=None)
        wait_s = None if first_s is None else max(0.0, first_s - self._clock())
        with suppress(Empty):
            self._inbox.get(timeout=wait_s)()
        now_s = self._clock()
        for fetch in [late for late in self._fetches if late.give_up_at_s <= now_s]:
            self._abandon(fetch)

    def _stop(self) -> None:
        self._is_closed = True
        for fetch in list(self._fetches):
            self._abandon(fetch)

    def _begin(self, fetch: Fetch) -> None:
        self._fetches.add(fetch)
        self._go_on(fetch)

    def _go_on(self, fetch: Fetch) -> None:
        if fetch.done():
            self._end(fetch)
            return
        while (number := fetch.next_to_read(self._clock())) is not None:
            tier = self._tiers[fetch.tiers[number]]
            tier.read(fetch.keys[number], partial(self._deliver, fetch, number))

    def _deliver(self, fetch: Fetch, number: int, outcome: Buffer | Miss) -> None:
        """Called from a store's thread, or from within `read`."""
        self._inbox.put(partial(self._accept, fetch, number, outcome))

    def _accept(self, fetch: Fetch, number: int, outcome: Buffer | Miss) -> None:
        if not isinstance(outcome, Miss):
            self._arrived(fetch, number, outcome)
        if fetch in self._fetches:
            fetch.accept(number, outcome, self._clock())
            self._go_on(fetch)

    def _abandon(self, fetch: Fetch) -> None:
        fetch.abandon()
        self._end(fetch)

    def _end(self, fetch: Fetch) -> None:
        self._fetches.discard(fetch)
        self._ended(fetch)
        if not fetch.is_cancelled:
            fetch.wake()
