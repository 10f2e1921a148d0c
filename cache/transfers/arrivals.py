"""Pages that another engine computes, on their way here: the side that waits for them.

It does not know how they travel.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from cache.keys import Key


def _nothing(*_: object) -> None:
    pass


class Arrivals:
    """Pages of a sequence, in order; a beginning of `keys` comes, at best all.

    `done`, `take` and `cancel` are the engine's, `accept` and `end` the carrier's, from one thread.
    """

    is_near = False
    """Computing them takes longer than any step."""

    def __init__(
        self,
        keys: Sequence[Key],
        wake: Callable[[], None] = _nothing,
        on_taken: Callable[[int], None] = _nothing,
        on_over: Callable[[], None] = _nothing,
        lease_s: float = inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wake` is called when something came or nothing more will; `on_taken` with the number of
        pages taken in all; `on_over` when nobody waits any more: also where nothing has come for
        `lease_s`. The last two hold the engine up.
        """
        self.keys = keys
        self.num_arrived = 0
        self.is_late = False
        """Given up, since nothing came for as long as the lease."""
        self._lease_s, self._clock = lease_s, clock
        self._last_s = clock()
        self._wake, self._on_taken, self._on_over = wake, on_taken, on_over
        self._ready: deque[tuple[Key, Any]] = deque()
        self._num_taken = 0
        self._is_done = self._is_cancelled = False

    def accept(self, images: Sequence[Any]) -> None:
        """The next pages have arrived."""
        if self._is_done or not images:
            return
        keys = self.keys[self.num_arrived : self.num_arrived + len(images)]
        self._ready.extend(zip(keys, images, strict=True))
        self.num_arrived += len(images)
        self._last_s = self._clock()
        if self.num_arrived == len(self.keys):
            self._is_done = True
        self._wake()

    def end(self) -> None:
        """Nothing more will arrive."""
        if not self._is_done:
            self._is_done = True
            self._wake()

    def done(self) -> bool:
        """Nothing more will arrive, or be waited for."""
        if not self._is_done and self._clock() - self._last_s > self._lease_s:
            self.is_late = self._is_done = True
            self._on_over()
        return self._is_done

    def take(self, most: int) -> list[tuple[Key, Any]]:
        """Up to `most` of the pages that have arrived, in order. Fewer, once it is `done`, are the
        last."""
        if self._is_cancelled:
            return []  # what was arriving just then may lack what came before it
        taken = [self._ready.popleft() for _ in range(min(most, len(self._ready)))]
        if taken:
            self._num_taken += len(taken)
            self._on_taken(self._num_taken)
        return taken

    def tier_of(self, key: Key) -> None:
        """None: they come from no tier."""

    @property
    def is_complete(self) -> bool:
        return self.num_arrived == len(self.keys)

    def cancel(self) -> None:
        """Nobody waits for it any more; what was not taken is let go."""
        self._is_cancelled = True
        if not self._is_done:
            self._is_done = True
            self._on_over()
        self._ready.clear()
