"""Pages on their way up, in order, and when it is time to stop waiting for them.

It does no reading and knows no tiers but by name.
"""

from collections import deque
from collections.abc import Buffer, Callable, Sequence
from dataclasses import dataclass, field

from cache.keys import Key
from cache.tiers.counts import Miss

READ_AHEAD = 8
"""Pages asked of stores at once: as many keep a disk busy, and more delay the first."""


@dataclass
class Span:
    """What a tier did for a fetch."""

    started_s: float
    arrived_s: list[float] = field(default_factory=list[float])
    """When each page arrived."""


class Fetch:
    """The longest beginning of `keys` that arrives before computing it would have been faster.

    The caller's side is `done`, `take` and `cancel`.
    """

    is_near = True
    """It is given up as soon as computing would be faster."""

    def __init__(
        self,
        keys: Sequence[Key],
        tiers: Sequence[str],
        recompute_s: Sequence[float],
        started_s: float,
        most_lost_s: float,
        wake: Callable[[], None] = lambda: None,
        num_cleared: int = 0,
    ) -> None:
        """`tiers` have the keys; `recompute_s[i]` is what computing `keys[: i + 1]` would take.
        They had been cleared `num_cleared` times when it began."""
        self.keys, self.tiers, self.num_cleared = keys, tiers, num_cleared
        self._tier_of = dict(zip(keys, tiers, strict=True))
        self.spans: dict[str, Span] = {}
        """By the name of the tier that was read."""
        self.num_arrived = 0
        """Pages that can be or were taken."""
        self.is_abandoned = self.is_cancelled = False
        self.wake = wake
        self._recompute_s = recompute_s
        self._last_moment_s = started_s + most_lost_s
        self._early: dict[int, Buffer | Miss] = {}
        """Arrived before those in front of them."""
        self._next = 0
        """The first page not asked for yet."""
        self._asked: set[int] = set()
        """Pages that have yet to be answered."""
        self._ready: deque[tuple[Key, Buffer]] = deque()
        self._is_done = False

    def done(self) -> bool:
        """Nothing more will arrive."""
        return self._is_done

    def take(self, most: int) -> list[tuple[Key, Buffer]]:
        """Up to `most` of the pages that have arrived, in order. Fewer, once it is `done`, are the
        last."""
        if self.is_cancelled:
            return []  # what was arriving just then may lack what came before it
        ready = self._ready
        return [ready.popleft() for _ in range(min(most, len(ready)))]

    def tier_of(self, key: Key) -> str:
        """Where a page that was taken came from."""
        return self._tier_of[key]

    def cancel(self) -> None:
        """Nobody waits for it any more; what was not taken is let go."""
        self.is_cancelled = self._is_done = True
        self._ready.clear()

    @property
    def give_up_at_s(self) -> float:
        """When computing what is still missing becomes the faster way.

        By then as much time has passed as computing what has arrived would have taken, and the
        little that may be lost.
        """
        saved_s = self._recompute_s[self.num_arrived - 1] if self.num_arrived else 0.0
        return self._last_moment_s + saved_s

    def next_to_read(self, now_s: float) -> int | None:
        """The number of a page to ask its tier for now."""
        while self._next in self._early:
            self._next += 1
        if self._is_done or self._next >= len(self.keys) or len(self._asked) >= READ_AHEAD:
            return None
        number = self._next
        self._next += 1
        self._asked.add(number)
        self.spans.setdefault(self.tiers[number], Span(now_s))
        return number

    def accept(self, number: int, outcome: Buffer | Miss, now_s: float) -> None:
        """Page `number` arrived, or will not; the first that doesn't ends the fetch."""
        if self._is_done:
            return
        self._early[number] = outcome
        self._asked.discard(number)
        span = self.spans.get(self.tiers[number])
        if span is not None and not isinstance(outcome, Miss):
            span.arrived_s.append(now_s)
        while self.num_arrived in self._early:
            arrived = self._early.pop(self.num_arrived)
            if isinstance(arrived, Miss):
                self._is_done = True
                return
            self._ready.append((self.keys[self.num_arrived], arrived))
            self.num_arrived += 1
        self._next = max(self._next, self.num_arrived)
        if self.num_arrived == len(self.keys):
            self._is_done = True

    def abandon(self) -> None:
        """It is too late for what has not arrived."""
        if not self._is_done:
            self.is_abandoned = self._is_done = True
