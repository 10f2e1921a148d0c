"""Pages between a replica's devices and the tiers below them.

It does not know requests, or why a page is saved or wanted.
"""

import logging
import time
from collections import deque
from collections.abc import Buffer, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from statistics import median
from threading import Lock

import numpy as np

from cache.keys import Key
from cache.pages import NULL_PAGE
from cache.tiers.counts import TierReport
from cache.tiers.fetch import Fetch
from cache.tiers.stack import TierStack
from model.step import State
from serve.page_images import BATCHES, PageImages, Reading

log = logging.getLogger("weft")

MOST_SAVED = 2 * BATCHES[-1]
"""Pages that a step may save: they lie on the device once more until the host has them."""
MOST_UNDER_WAY = 4 * MOST_SAVED
"""Pages that have been read and not yet been kept."""
LAST = 7
"""Landings whose median says what one takes."""


class TierTraffic:
    """What a scheduler (`serve.prefixes.Tiers`) and a runner need of tiers."""

    def __init__(
        self,
        stack: TierStack,
        images: PageImages,
        page_cost: Callable[[int], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`page_cost` is what computing a sequence's page of a number costs, in the scheduler's
        units."""
        self._stack, self._images = stack, images
        self._page_cost, self._clock = page_cost, clock
        self._wake: Callable[[], None] = lambda: None
        self._landing_s: deque[float] = deque([0.0], maxlen=LAST)
        """Seconds for a page."""
        self._num_under_way = 0
        self._lock = Lock()
        """Guards it."""
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="weft-saves")

    def start(self, wake: Callable[[], None]) -> None:
        """`wake` is called when pages have arrived, from another thread."""
        self._wake = wake
        self._stack.start()

    @property
    def num_savable(self) -> int:
        """Pages that the next step may save."""
        return min(MOST_SAVED, MOST_UNDER_WAY - self._num_under_way)

    def use(self, keys: Sequence[Key]) -> None:
        self._stack.use(keys)

    def holds(self, key: Key) -> bool:
        return bool(self._stack.find([key]))

    def fetch(self, keys: Sequence[Key], number: int) -> Fetch | None:
        """Brings the pages, from a sequence's page `number` on, if that is the faster way."""
        keys = keys[: len(self._stack.find(keys))]
        if not keys:
            return None
        costs = accumulate(self._page_cost(number + i) for i in range(len(keys)))
        landing_s = median(self._landing_s)
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
        with self._lock:
            self._num_under_way += len(saves)
        self._keeper.submit(self._keep, keys, self._images.read(state, pages))

    def land(self, state: State, landings: Sequence[tuple[int, Buffer]]) -> State:
        """The state, donated, with images in their pages."""
        if not landings:
            return state
        started_s = self._clock()
        images = [np.frombuffer(image, np.uint8) for _, image in landings]
        state = self._images.write(state, [page for page, _ in landings], images)
        self._landing_s.append((self._clock() - started_s) / len(landings))
        return state

    def reports(self) -> list[TierReport]:
        return self._stack.reports()

    def clear(self) -> None:
        """Lets the tiers forget what isn't pinned."""
        self._stack.clear()

    def compile_all(self, state: State) -> State:
        """Compiles what moves pages; the state, donated, is as it was but for the null page."""
        for batch in BATCHES:
            pages = [NULL_PAGE] * batch
            state = self._images.write(state, pages, self._images.read(state, pages).wait())
        return state

    def close(self, grace_s: float) -> None:
        """Keeps what has been read, for up to `grace_s` as far as stores are slow."""
        self._keeper.shutdown()
        self._stack.close(grace_s)

    def _keep(self, keys: Sequence[Key], reading: Reading) -> None:
        try:
            for key, image in zip(keys, reading.wait(), strict=True):
                self._stack.store(key, image)
        except Exception:
            log.exception("pages on their way to a tier were lost")
        finally:
            with self._lock:
                self._num_under_way -= len(keys)
            self._wake()
