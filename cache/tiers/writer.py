"""What brings pages into a store and keeps it within its budget: a queue and a thread.

The thread first lists what the store has; until then none of that is found, and nothing written. It
does not know who gives it pages.
"""

import time
from collections import deque
from collections.abc import Buffer, Callable, Iterable, Sequence
from itertools import islice
from threading import Condition, Thread

from cache.keys import Key
from cache.tiers.counts import Drop
from cache.tiers.folder import Answer
from cache.tiers.shelf import Shelf, error_of

WRITES = 8
"""Under way at once, as many as keep a disk busy."""
EVICTED_AT_ONCE = 16
"""So that a write does not wait for a store's round trip each time."""
LIST_S, WRITE_S = 120.0, 30.0
"""A store that takes longer hangs."""
SAVED_EVERY = 1024
"""Pages written until the order of use is saved: 16 bytes a page, beside images of thousands."""
SAVED_EVERY_S = 3600.0
"""The longest time without, so that others see that the folder is in use."""
RETRY_S = 1.0
JOIN_S = 1.0
"""What the thread takes to end beyond its grace."""


class Writer:
    """Writes to a shelf. Any thread may call its public side."""

    def __init__(
        self, shelf: Shelf, queue_pages: int, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """`queue_pages` may wait to be written; what comes on top is dropped."""
        self.pending: dict[Key, Buffer] = {}
        """Pages queued or being written."""
        self._shelf, self._queue_pages, self._wall_clock = shelf, queue_pages, wall_clock
        self._queue: deque[Key] = deque()
        self._unwanted: set[Key] = set()
        """Cleared and yet to be deleted: they have left the ledger, their room reserved."""
        self._under_way: deque[tuple[Key, Answer, int]] = deque()
        """Writes, oldest first, each with `_num_cleared` as it was when it began."""
        self._num_cleared = 0
        self._is_listed = False
        self._num_unsaved, self._saved_s = 0, shelf.clock()
        self._stop_at_s: float | None = None
        """Set when it is to close."""
        self._changed = Condition(shelf.lock)
        self._on_listed: Callable[[], None] = lambda: None
        self._thread = Thread(target=self._run, name=f"weft-tier-{shelf.name}", daemon=True)

    def start(self, on_listed: Callable[[], None]) -> None:
        """`on_listed` is called from the thread when it is known what the store has."""
        self._on_listed = on_listed
        self._thread.start()

    def put(self, key: Key, image: Buffer) -> None:
        """Queues a page that the shelf doesn't have."""
        with self._changed:
            if key in self.pending or key in self._shelf.ledger:
                return
            drops = self._shelf.counts.drops
            if self._stop_at_s is not None:
                drops[Drop.CLOSED] += 1
            elif self._shelf.writing.is_off(self._shelf.clock()):
                drops[Drop.OFF] += 1
            elif len(self._queue) >= self._queue_pages:
                drops[Drop.QUEUE_FULL] += 1
            else:
                self.pending[key] = image
                self._queue.append(key)
                self._changed.notify_all()

    def clear(self) -> None:
        """Forgets all pages that aren't pinned, those on their way included, and sees to their
        deletion."""
        ledger = self._shelf.ledger
        with self._changed:
            self._num_cleared += 1
            for key in [key for key in self.pending if not ledger.is_pinned(key)]:
                del self.pending[key]
            self._queue = deque(key for key in self._queue if key in self.pending)
            self._unwanted.update(ledger.clear())
            self._changed.notify_all()

    def await_cleared(self, timeout_s: float) -> bool:
        """Whether the store has nothing left of what was cleared; waits for that, unless it is
        switched off."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_cleared() or self._is_failing() or not self._is_running(),
                timeout_s,
            )
            return self._is_cleared()

    def stop(self, grace_s: float, last: Iterable[tuple[Key, Buffer]] = ()) -> None:
        """Takes no more pages than these; writes what is queued, then them, for up to `grace_s`."""
        with self._changed:
            for key, image in last:
                if key not in self.pending and key not in self._shelf.ledger:
                    self.pending[key] = image
                    self._queue.append(key)
            self._stop_at_s = self._shelf.clock() + grace_s
            self._changed.notify_all()

    def join(self) -> None:
        """Waits until it has stopped; a store that hangs doesn't hold it up for long."""
        if self._thread.ident is not None:
            self._thread.join(self._left_s(WRITE_S) + JOIN_S)

    def _run(self) -> None:
        while not self._list():
            with self._changed:
                if self._stop_at_s is not None:
                    return
                self._changed.wait(RETRY_S)
        self._on_listed()
        while self._wait_for_work():
            self._delete_unwanted()
            while (key := self._next()) is not None:
                self._delete_unwanted()
                self._write(key)
            if self._is_order_due():
                self._save_order()
        with self._changed:
            self._shelf.counts.drops[Drop.CLOSED] += len(self._queue)
            for key in self._queue:
                self.pending.pop(key, None)
            self._queue.clear()
        if self._left_s(WRITE_S) > 0:
            self._save_order()

    def _wait_for_work(self) -> bool:
        """Until something is queued or the order is to be saved; False when closed and done."""
        with self._changed:
            if not self._has_work() and self._stop_at_s is None and not self._is_order_due():
                self._changed.wait(RETRY_S if self._unwanted else SAVED_EVERY_S)
            return self._stop_at_s is None or (self._has_work() and self._left_s(WRITE_S) > 0)

    def _has_work(self) -> bool:
        can_delete = not self._shelf.writing.is_off(self._shelf.clock())
        return bool(self._queue or (self._unwanted and can_delete))

    def _is_running(self) -> bool:
        return self._thread.ident is not None and self._stop_at_s is None

    def _is_failing(self) -> bool:
        shelf, now_s = self._shelf, self._shelf.clock()
        cannot_list = not self._is_listed and shelf.reading.is_off(now_s)
        return cannot_list or shelf.writing.is_off(now_s)

    def _is_cleared(self) -> bool:
        began = (num_cleared for _, _, num_cleared in self._under_way)
        is_nothing_left = not self._unwanted and all(num == self._num_cleared for num in began)
        return is_nothing_left and (self._is_listed or not self._num_cleared)

    def _is_forgotten(self, key: Key, num_cleared: int) -> bool:
        """Whether it was cleared since it had been as often as that."""
        return num_cleared != self._num_cleared and not self._shelf.ledger.is_pinned(key)

    def _next(self) -> Key | None:
        """The next page to write; None once those that were queued are all written."""
        while True:
            with self._changed:
                if self._queue and len(self._under_way) < WRITES and self._left_s(WRITE_S) > 0:
                    return self._queue.popleft()
            if not self._await_write():
                return None

    def _left_s(self, most: float) -> float:
        """How long an operation may take."""
        if self._stop_at_s is None:
            return most
        return max(0.0, min(most, self._stop_at_s - self._shelf.clock()))

    def _list(self) -> bool:
        """Learns what the store has, and deletes what is too much; whether it could."""
        shelf = self._shelf
        if shelf.is_off():
            return False
        try:
            keys, others = shelf.folder.list(self._left_s(LIST_S))
        except Exception as error:
            shelf.reading.failed(error, shelf.clock())
            return False
        with self._changed:
            for key in keys:
                shelf.ledger.enter(key)
            if self._num_cleared:  # before it was known what there is
                self._unwanted.update(shelf.ledger.clear())
            self._is_listed = True
        while shelf.ledger.num_free < 0 and self._evict():
            pass
        for other in others:
            try:
                shelf.folder.remove_unused(other, self._wall_clock(), self._left_s(LIST_S))
            except Exception as error:
                shelf.writing.failed(error, shelf.clock())
        self._save_order()
        return True

    def _write(self, key: Key) -> None:
        if self._shelf.writing.is_off(self._shelf.clock()):
            self._drop(key, Drop.OFF)
            return
        with self._changed:
            image, num_cleared = self.pending.get(key), self._num_cleared
            is_there = key in self._shelf.ledger  # it was queued before the store was listed
            if is_there:
                self.pending.pop(key, None)
        # A write that nobody waited for any more may have ended since it was queued again.
        if is_there or image is None:
            return
        while not self._reserve():
            if not self._evict() and not self._await_write():
                self._drop(key, Drop.NO_ROOM)
                return
        record = self._shelf.form.encode(key, image)
        with self._changed:
            if self._is_forgotten(key, num_cleared):
                self._shelf.ledger.release()
                return
            answer = self._shelf.start_write(key, record)
            self._under_way.append((key, answer, num_cleared))

    def _reserve(self) -> bool:
        with self._changed:
            return self._shelf.ledger.reserve()

    def _await_write(self) -> bool:
        """Waits for the oldest write, if there is one."""
        if not self._under_way:
            return False
        key, answer, num_cleared = self._under_way[0]
        error_of(answer, self._left_s(WRITE_S))
        if answer.done():
            self._written(key, num_cleared, error_of(answer))
        else:
            self._give_up_write(key, num_cleared)
            # Its bytes may still come: its room is not given back before it ends, if ever.
            answer.add_done_callback(lambda late: self._written(key, num_cleared, error_of(late)))
        with self._changed:
            self._under_way.popleft()
            self._changed.notify_all()
        return True

    def _give_up_write(self, key: Key, num_cleared: int) -> None:
        is_closing = self._stop_at_s is not None
        if not is_closing:
            error = TimeoutError(f"no answer in {WRITE_S:.0f} s")
            self._shelf.writing.failed(error, self._shelf.clock())
        with self._changed:
            if not self._is_forgotten(key, num_cleared):
                self._drop(key, Drop.CLOSED if is_closing else Drop.FAILED)

    def _written(self, key: Key, num_cleared: int, error: BaseException | None) -> None:
        """A write ended that began when it had been cleared as often as that."""
        shelf, ledger = self._shelf, self._shelf.ledger
        if error is not None:  # a record comes whole or not at all, so its room is free
            shelf.writing.failed(error, shelf.clock())
        else:
            shelf.writing.succeeded()
        with self._changed:
            is_forgotten = self._is_forgotten(key, num_cleared)
            if is_forgotten and error is None:
                self._unwant(key)
                return
            ledger.release()
            if is_forgotten:
                return
            if error is not None:
                self._drop(key, Drop.FAILED)
                return
            if key in self._unwanted:  # it was written over
                self._unwanted.remove(key)
                ledger.release()
            ledger.enter(key)
            self.pending.pop(key, None)
            shelf.counts.written += 1
            shelf.counts.bytes_written += ledger.page_bytes
            self._num_unsaved += 1

    def _drop(self, key: Key, why: Drop) -> None:
        with self._changed:
            if self.pending.pop(key, None) is not None:
                self._shelf.counts.drops[why] += 1

    def _evict(self) -> bool:
        """Deletes the pages that are the least to lose; whether there is more room now."""
        shelf = self._shelf
        with self._changed:
            keys = shelf.ledger.evict(min(EVICTED_AT_ONCE, len(shelf.ledger) // 16 + 1))
            num_cleared = self._num_cleared
        deleted = self._delete(keys)
        with self._changed:
            for key in keys:
                if key in deleted:
                    shelf.ledger.release()
                elif self._is_forgotten(key, num_cleared):
                    self._unwant(key)
                else:
                    shelf.take_back(key)
            shelf.counts.evicted += len(deleted)
        return bool(deleted)

    def _unwant(self, key: Key) -> None:
        """A page that was cleared is in the store after all: it goes, with the room that is
        reserved for it."""
        with self._changed:
            if key in self._unwanted or key in self._shelf.ledger:
                self._shelf.ledger.release()
                return
            self._unwanted.add(key)
            self._changed.notify_all()

    def _delete_unwanted(self) -> None:
        """As far as the store lets it: what is left is tried again, and not found meanwhile."""
        while self._unwanted:
            with self._changed:
                keys = list(islice(self._unwanted, EVICTED_AT_ONCE))
            deleted = self._delete(keys)
            with self._changed:
                for key in deleted & self._unwanted:
                    self._unwanted.remove(key)
                    self._shelf.ledger.release()
                self._changed.notify_all()
            if len(deleted) < len(keys):
                return

    def _delete(self, keys: Sequence[Key]) -> set[Key]:
        """Deletes the records of pages that have left the ledger; returns those that are gone."""
        shelf, deleted = self._shelf, set[Key]()
        if shelf.writing.is_off(shelf.clock()):
            return deleted
        for key, answer in [(key, shelf.delete(key)) for key in keys]:
            error = error_of(answer, self._left_s(WRITE_S))
            if error is None:
                deleted.add(key)
            else:
                shelf.writing.failed(error, shelf.clock())
        return deleted

    def _is_order_due(self) -> bool:
        elapsed_s = self._shelf.clock() - self._saved_s
        return self._num_unsaved >= SAVED_EVERY or elapsed_s >= SAVED_EVERY_S

    def _save_order(self) -> None:
        """For the next start, and for others who look whether the folder is in use."""
        shelf = self._shelf
        with self._changed:
            keys = shelf.ledger.keys()
            self._num_unsaved, self._saved_s = 0, shelf.clock()
        if shelf.writing.is_off(self._saved_s):
            return
        try:
            shelf.folder.save_order(keys, self._wall_clock(), self._left_s(WRITE_S))
        except Exception as error:
            shelf.writing.failed(error, shelf.clock())
