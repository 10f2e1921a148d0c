"""A tier on a local disk or in object storage.

One engine writes a model's folder: what another writes there is found by the next start, and what
it deletes is a miss. Whatever the store does, the tier answers with a miss, counts it, says it
once, and is switched off for a while if it goes on. It does not know other tiers, or whether
reading is worth it.
"""

import time
from collections.abc import Buffer, Callable, Iterable, Sequence

from cache.events import OnChange
from cache.keys import Key
from cache.tiers.counts import Decisions, Miss, TierReport
from cache.tiers.folder import Answer, Store
from cache.tiers.record import RecordFormat
from cache.tiers.shelf import Shelf, error_of
from cache.tiers.writer import Writer

READ_S = 5.0
"""A store that takes longer hangs. No request waits for it: a fetch is given up long before."""


class StoreTier:
    """Up to `budget_bytes` of records. Any thread may call; nothing waits for the store."""

    def __init__(
        self,
        name: str,
        store: Store,
        form: RecordFormat,
        budget_bytes: int,
        *,
        queue_pages: int = 256,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`queue_pages` may wait to be written; what comes on top is dropped."""
        self.name = name
        self._shelf = Shelf(name, store, form, budget_bytes, clock)
        self._ledger, self._counts = self._shelf.ledger, self._shelf.counts
        self._writer = Writer(self._shelf, queue_pages, wall_clock)
        self._reads: dict[object, float] = {}
        """When each read under way began, oldest first."""

    def start(self, on_listed: Callable[[], None] = lambda: None) -> None:
        """`on_listed` is called from another thread when it is known what the store has."""
        self._writer.start(on_listed)

    def holds(self, key: Key) -> bool:
        is_here = key in self._writer.pending or key in self._ledger
        return is_here and not self._shelf.reading.is_off(self._shelf.clock())

    def write(self, key: Key, image: Buffer) -> None:
        """Queues a page."""
        self._writer.put(key, image)

    def read(self, key: Key, deliver: Callable[[Buffer | Miss], None]) -> None:
        """Calls `deliver` once, from any thread; never if the store hangs."""
        image = self._writer.pending.get(key)
        now_s, token = self._shelf.clock(), object()
        if image is not None:
            deliver(self._counted(image))
            return
        self._give_up_reads(now_s)
        if self._shelf.reading.is_off(now_s):
            deliver(self._counted(Miss.OFF))
            return
        with self._shelf.lock:
            self._reads[token] = now_s
        answer = self._shelf.start_read(key)
        answer.add_done_callback(lambda answer: deliver(self._result(key, token, answer)))

    def use(self, keys: Sequence[Key]) -> None:
        """A sequence's pages, given from its start, were used."""
        with self._shelf.lock:
            self._ledger.use(keys)

    def newest(self, most: int) -> list[Key]:
        """Up to `most` pages that are there, the most recently used first."""
        with self._shelf.lock:
            return self._ledger.keys()[::-1][:most]

    def pin(self, keys: Sequence[Key]) -> None:
        """Keeps the pages, here or yet to come, until `unpin` (PinsExceedBudget)."""
        with self._shelf.lock:
            self._ledger.pin(keys)

    def unpin(self, keys: Sequence[Key]) -> None:
        with self._shelf.lock:
            self._ledger.unpin(keys)

    def is_pinned(self, key: Key) -> bool:
        return self._ledger.is_pinned(key)

    def clear(self) -> None:
        """Forgets all pages that aren't pinned, those being written included, and begins to delete
        them; what cannot be deleted takes room until it can."""
        self._writer.clear()

    def await_cleared(self, timeout_s: float) -> bool:
        """Whether the store has nothing left of what was cleared; waits for that as long as it
        works."""
        return self._writer.await_cleared(timeout_s)

    def follow(self, on_change: OnChange) -> None:
        """Tells of the pages that have been written, and from then on of each change."""
        with self._shelf.lock:
            self._ledger.follow(on_change)

    def stop(self, grace_s: float, last: Iterable[tuple[Key, Buffer]] = ()) -> None:
        """Takes no more pages than these; writes for up to `grace_s`."""
        self._writer.stop(grace_s, last)

    def join(self) -> None:
        """Waits until it has stopped."""
        self._writer.join()

    def report(self, decisions: Decisions) -> TierReport:
        shelf = self._shelf
        with shelf.lock:
            counts = self._counts.copy()
            counts.errors = shelf.reading.reasons + shelf.writing.reasons
            return TierReport(
                name=self.name,
                num_pages=len(self._ledger),
                num_pinned=self._ledger.num_pinned,
                page_bytes=self._ledger.page_bytes,
                budget_bytes=self._ledger.budget_bytes,
                num_queued=len(self._writer.pending),
                is_off=shelf.is_off(),
                counts=counts,
                decisions=decisions,
            )

    def _result(self, key: Key, token: object, answer: Answer) -> Buffer | Miss:
        """What a read that ended gave; a page that can't be read is let go."""
        shelf = self._shelf
        with shelf.lock:
            self._reads.pop(token, None)
        error = error_of(answer)
        if error is not None:
            shelf.reading.failed(error, shelf.clock())
            return self._counted(Miss.FAILED)
        shelf.reading.succeeded()
        found = answer.result()
        if found.state == "missing":
            with shelf.lock:
                if self._ledger.leave(key):
                    self._ledger.release()
            return self._counted(Miss.ABSENT)
        outcome = shelf.form.decode(key, found.value)
        if isinstance(outcome, Miss):
            with shelf.lock:
                is_here = self._ledger.leave(key)
            if is_here:
                shelf.delete_in_background(key)
        return self._counted(outcome)

    def _counted(self, outcome: Buffer | Miss) -> Buffer | Miss:
        with self._shelf.lock:
            if isinstance(outcome, Miss):
                self._counts.misses[outcome] += 1
            else:
                self._counts.hits += 1
                self._counts.bytes_read += self._ledger.page_bytes
        return outcome

    def _give_up_reads(self, now_s: float) -> None:
        """Takes reads that began too long ago for failures."""
        with self._shelf.lock:
            hung = [token for token, began_s in self._reads.items() if began_s < now_s - READ_S]
            for token in hung:
                del self._reads[token]
        for _ in hung:
            self._shelf.reading.failed(TimeoutError(f"no answer in {READ_S:.0f} s"), now_s)
