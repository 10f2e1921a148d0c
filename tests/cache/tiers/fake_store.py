"""A store that fails, hangs, waits and forgets as it is told, and knows the most it ever held."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import SimpleNamespace
from typing import Any

from cache.keys import KEY_BYTES, Key
from cache.tiers.record import RecordFormat

IMAGE_BYTES = 128
NUM_THREADS = 4
"""Of a store with a delay."""
FORM = RecordFormat(b"0123456789abcdef", IMAGE_BYTES)
DISK_FULL = ValueError(
    "RESOURCE_EXHAUSTED: Failed writing: \"/cache/a\": No space left on device [os_error_code='28']"
)
"""What tensorstore said of a full tmpfs."""


class FakeStore:
    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.errors: dict[str, Exception] = {}
        """By operation: what it raises through its future."""
        self.hanging: set[str] = set()
        """Operations that don't end."""
        self.hung: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.delay_s = 0.0
        self.peak_bytes = 0
        self.num_calls = dict.fromkeys(("read", "write", "delete", "list", "delete_range"), 0)
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(NUM_THREADS)

    def read(self, key: str, *, byte_range: slice | None = None) -> Future[Any]:
        def run() -> SimpleNamespace:
            value = self.data.get(key)
            if value is None:
                return SimpleNamespace(state="missing", value=b"")
            return SimpleNamespace(state="value", value=value[byte_range or slice(None)])

        return self._do("read", run)

    def write(self, key: str, value: bytes | None) -> Future[Any]:
        def run() -> None:
            with self._lock:
                if value is None:
                    self.data.pop(key, None)
                    return
                self.data[key] = value
                self.peak_bytes = max(self.peak_bytes, sum(map(len, self.records().values())))

        return self._do("delete" if value is None else "write", run)

    def list(self) -> Future[Any]:
        return self._do("list", lambda: [key.encode() for key in self.data])

    def delete_range(self, range: Any) -> Future[Any]:
        def run() -> None:
            first, last = range.inclusive_min.decode(), range.exclusive_max.decode()
            for key in [key for key in self.data if first <= key < last]:
                del self.data[key]

        return self._do("delete_range", run)

    def records(self) -> dict[str, bytes]:
        return {name: data for name, data in self.data.items() if name.count("/") == 2}

    def release(self) -> None:
        """Lets what hangs go on."""
        self.hanging.clear()
        while self.hung:
            future, run = self.hung.pop()
            future.set_result(run())

    def _do(self, name: str, run: Callable[[], Any]) -> Future[Any]:
        self.num_calls[name] += 1
        future: Future[Any] = Future()
        if name in self.errors:
            future.set_exception(self.errors[name])
        elif name in self.hanging:
            self.hung.append((future, run))
        elif self.delay_s:
            return self._pool.submit(lambda: (time.sleep(self.delay_s), run())[1])
        else:
            future.set_result(run())
        return future


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def key(number: int) -> Key:
    return number.to_bytes(KEY_BYTES, "big")


def keys(number: int) -> list[Key]:
    return [key(i) for i in range(number)]


def image(of: Key) -> bytes:
    return of * (IMAGE_BYTES // KEY_BYTES)


def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Waits for another thread."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        time.sleep(0.001)
