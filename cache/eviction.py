"""Which of the pages that may go is the least to lose.

A page is worth what computing it again would cost, times how likely it is to be asked for again:
that is learned from pages that had been used as often, and falls with the time since its last use.
It knows neither names nor owners; a page is a number.
"""

import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush

MOST_USES = 3
"""Pages used as often or more are alike."""
COSTS_PER_DOUBLING = 2
"""Pages are alike in cost if one costs less than 2 ** (1 / 2) times the other."""
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
        """`cost` is what computing the token at a position takes, in any unit."""
        self._cost, self._page_size = cost, page_size
        self._kind_at_depth: list[int] = []
        self._kind = [0] * num_pages
        """By page: its cost, and how often it has been used."""
        self._now = 0
        self._used_at = [0] * num_pages
        self._waits = [False] * num_pages
        self._heaps: dict[int, list[tuple[int, int]]] = {}
        """By kind: (used_at, page). Entries of pages that left or were used are passed over."""
        self._num_entries = 0
        self._used = [1.0] * (MOST_USES + 1)
        """By uses before: pages used once more."""
        self._lost = [1.0] * (MOST_USES + 1)
        """By uses before: pages evicted."""

    def begin(self, page: int, depth: int) -> None:
        """A page was computed: a sequence's page number `depth`."""
        kinds = self._kind_at_depth
        while len(kinds) <= depth:
            doublings = math.log2(max(self._cost(len(kinds) * self._page_size), 1.0))
            kinds.append((MOST_USES + 1) * round(doublings * COSTS_PER_DOUBLING))
        self._kind[page] = kinds[depth]
        self._now += 1
        self._used_at[page] = self._now

    def use(self, page: int) -> None:
        """The page was asked for."""
        uses = self._kind[page] % (MOST_USES + 1)
        self._learn(self._used, uses)
        if uses < MOST_USES:
            self._kind[page] += 1
        self._now += 1
        self._used_at[page] = self._now

    def wait(self, page: int) -> None:
        """From now on the page may go."""
        self._waits[page] = True
        if self._num_entries > 2 * len(self._waits):
            self._forget_stale()
        heap = self._heaps.setdefault(self._kind[page], [])
        heappush(heap, (self._used_at[page], page))
        self._num_entries += 1

    def leave(self, page: int) -> None:
        """The page may not go any more."""
        self._waits[page] = False

    def evict(self) -> int:
        """The page that is worth least; it leaves. Some page must wait."""
        kind, least = -1, math.inf
        for other, heap in self._heaps.items():
            while heap and not self._is_current(other, *heap[0]):
                heappop(heap)
                self._num_entries -= 1
            if heap and (worth := self._worth(other, heap[0][0])) < least:
                kind, least = other, worth
        assert kind >= 0, "no page waits"
        _, page = heappop(self._heaps[kind])
        self._num_entries -= 1
        self._waits[page] = False
        self._learn(self._lost, kind % (MOST_USES + 1))
        return page

    def _is_current(self, kind: int, used_at: int, page: int) -> bool:
        return self._waits[page] and self._used_at[page] == used_at and self._kind[page] == kind

    def _worth(self, kind: int, used_at: int) -> float:
        cost, uses = divmod(kind, MOST_USES + 1)
        likely = self._used[uses] / (self._used[uses] + self._lost[uses])
        return 2 ** (cost / COSTS_PER_DOUBLING) * likely / (self._now - used_at + 1)

    def _learn(self, ends: list[float], uses: int) -> None:
        ends[uses] += 1
        if self._used[uses] + self._lost[uses] > MEMORY:
            self._used[uses] /= 2
            self._lost[uses] /= 2

    def _forget_stale(self) -> None:
        for kind, heap in self._heaps.items():
            current = {entry for entry in heap if self._is_current(kind, *entry)}
            self._heaps[kind] = list(current)
            heapify(self._heaps[kind])
        self._num_entries = sum(map(len, self._heaps.values()))
