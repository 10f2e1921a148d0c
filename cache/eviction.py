"""Which of the pages that may go is the least to lose.

A page is worth what computing it again would cost, times how likely it is to be asked for again:
that is learned from pages that had been used as often, and falls with the time since its last use.
It knows neither names nor owners; a page is a number.
"""

import math
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

MOST_USES = 3
"""Pages used as often or more are alike."""
NUM_USES = MOST_USES + 1
COSTS_PER_DOUBLING = 2
"""Pages are alike in cost if one costs less than 2 ** (1 / 2) times the other."""
AGE_POWER = 3
"""How fast worth falls with age. At 1, which a reuse at any order of age would suggest, costs and
uses outweigh age, and less is found than by age alone (docs/context-caching.md)."""
MEMORY = 4096
"""Pages that a likelihood is learned from; then all count half, so that it follows what changes."""


class EvictionOrder:
    """Pages that may go, least worth first.

    Time is counted in pages computed and used: it neither stands still nor goes back, and a server
    left alone over night forgets nothing.
    """

    def __init__(
        self, num_pages: int, page_size: int, cost: Callable[[int], float] = lambda position: 1.0
    ) -> None:
        """`cost` is what computing the token at a position takes, in any unit; it doesn't fall."""
        self._cost, self._page_size, self._num_pages = cost, page_size, num_pages
        self._kind_at_depth: list[int] = []
        self._kind = [0] * num_pages
        """By page: its cost, and how often it has been used."""
        self._now = 1
        self._stamp = [0] * num_pages
        """By page: when it was last used, times num_pages, plus page: a heap of ints is fast."""
        self._waits = [False] * num_pages
        self._heaps: dict[int, list[int]] = {}
        """By kind: stamps. Those of pages that left or were used are passed over."""
        self._num_entries = 0
        self._used = [1.0] * NUM_USES
        """By uses before: pages used once more."""
        self._lost = [1.0] * NUM_USES
        """By uses before: pages evicted."""

    def begin(self, page: int, depth: int) -> None:
        """A page was computed: a sequence's page number `depth`."""
        kinds = self._kind_at_depth
        while len(kinds) <= depth:
            doublings = math.log2(max(self._cost(len(kinds) * self._page_size), 1.0))
            kinds.append(NUM_USES * round(doublings * COSTS_PER_DOUBLING))
        self._kind[page] = kinds[depth]
        self._now += 1
        self._stamp[page] = self._now * self._num_pages + page

    def use(self, pages: Sequence[int]) -> None:
        """The pages, given from a sequence's start, were asked for."""
        kind, stamp, num_pages = self._kind, self._stamp, self._num_pages
        used = [0] * NUM_USES
        at = self._now * num_pages
        for page in pages:
            uses = kind[page] % NUM_USES
            used[uses] += 1
            if uses < MOST_USES:
                kind[page] += 1
            at += num_pages
            stamp[page] = at + page
        self._now += len(pages)
        for uses, count in enumerate(used):
            self._used[uses] += count
        self._halve()

    def wait(self, page: int) -> None:
        """From now on the page may go."""
        self._waits[page] = True
        if self._num_entries > 2 * self._num_pages:
            self._forget_stale()
        heappush(self._heaps.setdefault(self._kind[page], []), self._stamp[page])
        self._num_entries += 1

    def leave(self, pages: Sequence[int]) -> None:
        """The pages may not go any more."""
        waits = self._waits
        for page in pages:
            waits[page] = False

    def evict(self) -> int:
        """The page that is worth least; it leaves. Some page must wait."""
        kind, least = -1, math.inf
        for other, heap in self._heaps.items():
            while heap and not self._is_current(heap[0]):
                heappop(heap)
                self._num_entries -= 1
            if heap and (worth := self._worth(other, heap[0])) < least:
                kind, least = other, worth
        assert kind >= 0, "no page waits"
        page = heappop(self._heaps[kind]) % self._num_pages
        self._num_entries -= 1
        self._waits[page] = False
        self._lost[kind % NUM_USES] += 1
        self._halve()
        return page

    def evict_next(self, page: int, evicted: int) -> bool:
        """Evicts `page`, too, if it is certain to be worth least now that `evicted`, which stood on
        it, has gone; else it waits.

        So a sequence goes page by page without a search for each.
        """
        uses = self._kind[page] % NUM_USES
        # It costs no more, being nearer to the start.
        if uses == self._kind[evicted] % NUM_USES and self._stamp[page] < self._stamp[evicted]:
            self._lost[uses] += 1
            return True
        self.wait(page)
        return False

    def _is_current(self, stamp: int) -> bool:
        page = stamp % self._num_pages
        return self._waits[page] and self._stamp[page] == stamp

    def _worth(self, kind: int, stamp: int) -> float:
        cost, uses = divmod(kind, NUM_USES)
        likely = self._used[uses] / (self._used[uses] + self._lost[uses])
        age = self._now - stamp // self._num_pages + 1
        return 2 ** (cost / COSTS_PER_DOUBLING) * likely / age**AGE_POWER

    def _halve(self) -> None:
        for uses in range(NUM_USES):
            if self._used[uses] + self._lost[uses] > MEMORY:
                self._used[uses] /= 2
                self._lost[uses] /= 2

    def _forget_stale(self) -> None:
        for kind, heap in self._heaps.items():
            self._heaps[kind] = list(set(filter(self._is_current, heap)))
            heapify(self._heaps[kind])
        self._num_entries = sum(map(len, self._heaps.values()))
