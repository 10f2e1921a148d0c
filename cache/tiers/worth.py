"""Whether a tier is faster than computing again, from what both took.

Until a tier was measured it is taken for endlessly slow, and prefill for endlessly fast, so nothing
is fetched on a guess; a tier that loses is read again now and then beside requests (`probe_due`),
so that it can win later. It does not know pages or the clock.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from math import inf
from statistics import median
from threading import Lock

LAST = 7
"""Measurements of a tier and size that count: their median stands up to three outliers."""
LAST_PREFILLS = 31
LARGEST = 64
"""Pages; a larger fetch takes as much for each page as one of these."""
MOST_LOST = 0.05
"""Of what computing takes: as much may be lost by waiting for a tier in vain."""
REFUSALS = 8
"""After as many a tier that loses is probed again."""


class Worth:
    """What fetching and computing take. Any thread may call."""

    def __init__(self, most_lost: float = MOST_LOST) -> None:
        self.most_lost = most_lost
        self._page_s: dict[str, dict[int, deque[float]]] = defaultdict(dict)
        """By tier and size class: seconds for each page of a fetch."""
        self._first_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LAST))
        """By tier: until the first page of a fetch was there."""
        self._prefill_s: deque[float] = deque(maxlen=LAST_PREFILLS)
        """Seconds for a unit of cost."""
        self._refusals: dict[str, int] = defaultdict(int)
        """By tier: since it was measured."""
        self._lock = Lock()

    def observe_prefill(self, cost: float, seconds: float) -> None:
        """A prefill of `cost`, in the engine's units, took `seconds`."""
        if cost > 0:
            with self._lock:
                self._prefill_s.append(seconds / cost)

    def recompute_s(self, costs: Sequence[float]) -> list[float]:
        """What computing each of these costs would take; 0 until a prefill was measured."""
        with self._lock:
            rate = median(self._prefill_s) if self._prefill_s else 0.0
        return [cost * rate for cost in costs]

    def observe_fetch(self, tier: str, num_pages: int, first_s: float, all_s: float) -> None:
        """A fetch of pages from a tier had the first after `first_s`, all after `all_s`: endless
        if it was given up."""
        size = _size_class(num_pages)
        with self._lock:
            lasts = self._page_s[tier].setdefault(size, deque(maxlen=LAST))
            lasts.append(all_s / num_pages)
            self._first_s[tier].append(first_s)
            self._refusals[tier] = 0

    def fetch_s(self, tier: str, num_pages: int) -> float:
        """What fetching pages from a tier will take."""
        with self._lock:
            medians = {size: median(lasts) for size, lasts in self._page_s[tier].items()}
        own = medians.get(_size_class(num_pages))
        if own is not None:
            return own * num_pages
        # A fetch takes no more than a larger one, nor, for each page, than a smaller one.
        return min(
            (page_s * max(num_pages, 1 << size - 1) for size, page_s in medians.items()),
            default=inf,
        )

    def decide(self, num_pages: int, tier: str, recompute_s: float) -> bool:
        """Whether to fetch the pages; computing them would take `recompute_s`."""
        if self.fetch_s(tier, num_pages) < recompute_s:
            with self._lock:
                first_s = median(self._first_s[tier])
            # Else it would be given up before anything arrives.
            if first_s < self.most_lost * recompute_s:
                return True
        with self._lock:
            self._refusals[tier] += 1
        return False

    def probe_due(self, tier: str) -> bool:
        """Whether the tier, refused just now, should be measured again."""
        with self._lock:
            return not self._page_s[tier] or self._refusals[tier] >= REFUSALS


def _size_class(num_pages: int) -> int:
    return min(num_pages, LARGEST).bit_length()
