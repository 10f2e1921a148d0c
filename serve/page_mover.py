"""Pages that leave a replica's devices and come to them, in the order in which steps are submitted.

It does not know names, or where images go to and come from.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from cache.pages import NULL_PAGE
from model.step import State
from serve.page_images import BATCHES, PageImages, Reading

log = logging.getLogger("weft")

LAST = 7
"""Landings whose median says what one takes."""


class PageMover:
    """Reading and writing of pages beside steps. `read` and `land` are the engine's thread's."""

    def __init__(
        self,
        images: PageImages,
        destination: PageImages | None = None,
        stays_on_devices: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`destination` is where pages will go that stay on devices of this process;
        `stays_on_devices` where they come so, or go to another process."""
        self.images, self.destination = images, destination
        self._stays_on_devices = stays_on_devices
        self._clock = clock
        self._landing_s: deque[float] = deque([0.0], maxlen=LAST)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="weft-pages")

    @property
    def landing_s(self) -> float:
        """Seconds that the landing of a page takes."""
        return median(self._landing_s)

    def read(
        self,
        state: State,
        pages: Sequence[int],
        then: Callable[[Sequence[Any]], None],
        destination: PageImages | None = None,
    ) -> None:
        """Starts to read pages as they are after the steps submitted so far; `then` is given their
        images on another thread, or none if they are lost. They are on the host or, with a
        `destination`, on its devices."""
        self._readers.submit(_finish, self.images.read(state, pages, destination), then)

    def land(self, state: State, landings: Sequence[tuple[int, Any]]) -> State:
        """The state, donated, with images in their pages."""
        if not landings:
            return state
        started_s = self._clock()
        pages, images = zip(*landings, strict=True)
        state = self.images.write(state, pages, images)
        self._landing_s.append((self._clock() - started_s) / len(landings))
        return state

    def compile_all(self, state: State) -> State:
        """Compiles what moves pages; the state, donated, is as it was but for the null page."""
        for batch in BATCHES:
            pages = [NULL_PAGE] * batch
            if self.destination is not None:
                self.images.read(state, pages, self.destination).wait()
            if self._stays_on_devices:
                here = self.images.read(state, pages, self.images).wait()
                self.images.compile_checksums(batch)
                state = self.images.write(state, pages, here)
            state = self.images.write(state, pages, self.images.read(state, pages).wait())
        return state

    def close(self) -> None:
        """Returns when what has been read is where it should be."""
        self._readers.shutdown()


def _finish(reading: Reading, then: Callable[[Sequence[Any]], None]) -> None:
    images: Sequence[Any] = []
    try:
        images = reading.wait()
    except Exception:
        log.exception("pages that were read are lost")
    try:
        then(images)
    except Exception:
        log.exception("pages that were read are lost on their way")
