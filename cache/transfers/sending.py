"""Pages of a prompt that another engine waits for: the side that has them.

It does not know where a page lies, or how it travels.
"""

from collections.abc import Callable, Sequence
from typing import Any

WINDOW = 64
"""Pages on their way at once: read from the device and not yet taken by the receiver."""


class Sending:
    """The full pages `first` to `last - 1` of a prompt, given to `deliver` in order.

    The engine that computes them asks for `readable` and says `read`; `taken` and `end` are the
    receiver's, from any thread.
    """

    def __init__(
        self,
        first: int,
        last: int,
        deliver: Callable[[int, Sequence[Any]], None],
        window: int = WINDOW,
        on_lost: Callable[[], None] = lambda: None,
        stays_on_devices: bool = False,
    ) -> None:
        """`deliver(number, images)`, of the pages from a number on, is called from a thread of the
        engine's, `on_lost` instead when a page could not be read. An image is bytes, or where it is
        to stay on devices whatever the engine has there."""
        if not 0 <= first < last:
            raise ValueError(f"pages {first} to {last - 1} are none; ask for one or more")
        self.first, self.last = first, last
        self.deliver, self.stays_on_devices = deliver, stays_on_devices
        self.next = first
        """The page to be read next."""
        self.num_delivered = 0
        """Pages that were read and have left the devices, or were lost on the way."""
        self.num_taken = 0
        """Pages that the receiver has."""
        self._window, self._on_lost = window, on_lost
        self._has_ended = False

    @property
    def is_over(self) -> bool:
        """All was read, or nobody waits any more."""
        return self._has_ended or self.next == self.last

    @property
    def is_blocked(self) -> bool:
        """Nothing more is read until the receiver has taken something."""
        return self.next - self.first >= self.num_taken + self._window

    def readable(self, num_computed: int) -> range:
        """The pages to read now, if the prompt's first `num_computed` are there."""
        if self._has_ended:
            return range(self.next, self.next)
        most = self.first + self.num_taken + self._window
        return range(self.next, max(self.next, min(num_computed, self.last, most)))

    def read(self, pages: range) -> None:
        """Those of `readable` that are being read: the first ones."""
        assert pages.start == self.next, "pages are read in order"
        self.next = pages.stop

    @property
    def num_on_devices(self) -> int:
        """Pages of which the devices have a copy, to be delivered."""
        return self.next - self.first - self.num_delivered

    def taken(self, num_pages: int) -> None:
        """The receiver has as many, in all."""
        self.num_taken = max(self.num_taken, min(num_pages, self.next - self.first))

    def end(self) -> None:
        """Nobody waits for the rest."""
        self._has_ended = True

    def lose(self) -> None:
        """A page could not be read: nothing comes after it."""
        self._has_ended = True
        self._on_lost()
