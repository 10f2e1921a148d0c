"""What reading and writing a store's pages share: the ledger, the counts, and what fails.

It does not know when to read or write.
"""

import time
from asyncio import CancelledError
from collections.abc import Callable
from concurrent.futures import Future
from threading import RLock
from typing import Any

from cache.keys import Key
from cache.tiers.breaker import Breaker
from cache.tiers.counts import TierCounts
from cache.tiers.folder import Answer, Folder, Store
from cache.tiers.ledger import Ledger
from cache.tiers.record import RecordFormat


class Shelf:
    """One model's pages in one store. `lock` guards ledger and counts."""

    def __init__(
        self,
        name: str,
        store: Store,
        form: RecordFormat,
        budget_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.form, self.clock = name, form, clock
        self.folder = Folder(store, form.fingerprint)
        self.ledger = Ledger(name, budget_bytes, form.record_bytes)
        self.counts = TierCounts()
        self.reading = Breaker(f"reading from tier {name}")
        self.writing = Breaker(f"writing to tier {name}")
        self.lock = RLock()
        self._store = store

    def is_off(self) -> bool:
        now_s = self.clock()
        return self.reading.is_off(now_s) or self.writing.is_off(now_s)

    def start_read(self, key: Key) -> Answer:
        return started(self._store.read, self.folder.path(key))

    def start_write(self, key: Key, record: bytes) -> Answer:
        return started(self._store.write, self.folder.path(key), record)

    def delete(self, key: Key) -> Answer:
        """Begins to delete the record of a page that has left the ledger, its room reserved."""
        return started(self._store.write, self.folder.path(key), None)

    def take_back(self, key: Key) -> None:
        """A page that had left the ledger stays after all."""
        with self.lock:
            self.ledger.release()
            self.ledger.enter(key)

    def delete_in_background(self, key: Key) -> None:
        """As `delete`, and sees to its end: the page's room is free, or it is still there."""

        def ended(answer: Answer) -> None:
            error = error_of(answer)
            if error is not None:
                self.writing.failed(error, self.clock())
                self.take_back(key)
                return
            with self.lock:
                self.ledger.release()

        self.delete(key).add_done_callback(ended)


def started(operation: Callable[..., Answer], *arguments: Any) -> Answer:
    """The answer to come; a failed one where it fails at once."""
    try:
        return operation(*arguments)
    except Exception as error:
        failed = Future[None]()
        failed.set_exception(error)
        return failed


def error_of(answer: Answer, timeout_s: float | None = None) -> BaseException | None:
    """Why the operation failed: TimeoutError also where it has not ended."""
    try:
        answer.result(timeout=timeout_s)
    except (Exception, CancelledError) as error:
        return error
    return None
