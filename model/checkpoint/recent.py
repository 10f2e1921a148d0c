"""What was made last, kept within a budget of bytes and made once however many threads ask.

It does not know what it keeps.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future


class Recent[Value]:
    """The values asked for last; always the very last one, unless `max_bytes` is zero."""

    def __init__(self, max_bytes: int, size_of: Callable[[Value], int]):
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Future[Value]] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, from `make` when it is not kept; an error of `make` is not kept."""
        with self._lock:
            kept = self._values.get(key)
            if kept is None:
                future = self._values[key] = Future()
            else:
                self._values.move_to_end(key)
        if kept is not None:
            return kept.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._values[key]
            future.set_exception(error)
            raise
        with self._lock:
            self._num_bytes += self._size_of(value)
            future.set_result(value)
            self._trim()
        return value

    def _trim(self) -> None:
        done = [key for key, future in self._values.items() if future.done()]
        spared = 1 if self._max_bytes else 0
        for key in done[: len(done) - spared]:
            if self._num_bytes <= self._max_bytes:
                return
            self._num_bytes -= self._size_of(self._values.pop(key).result())
