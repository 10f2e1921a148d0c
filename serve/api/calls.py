"""How many calls of a service are under way: a server that drains waits for them."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager


class Calls:
    def __init__(self) -> None:
        self.idle = asyncio.Event()
        """Set while there are none."""
        self.idle.set()
        self._num_running = 0

    @contextmanager
    def counted(self) -> Generator[None]:
        """Around a call."""
        self._num_running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self.idle.set()
