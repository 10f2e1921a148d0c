"""The tier in the host's memory: images by name, within a budget.

What it gives up goes to the caller, who may keep it further down. It does not know other tiers.
"""

from collections.abc import Buffer, Sequence
from threading import Lock

from cache.events import OnChange
from cache.keys import Key
from cache.tiers.counts import Decisions, TierCounts, TierReport
from cache.tiers.ledger import Ledger

HOST = "host"


class HostTier:
    """Up to `budget_bytes` of images, all of the same length. Any thread may call."""

    name = HOST

    def __init__(self, budget_bytes: int, image_bytes: int) -> None:
        self._ledger = Ledger(HOST, budget_bytes, image_bytes)
        self._images: dict[Key, Buffer] = {}
        self._counts = TierCounts()
        self._lock = Lock()

    def holds(self, key: Key) -> bool:
        return key in self._images

    def get(self, key: Key) -> Buffer | None:
        image = self._images.get(key)
        if image is not None:
            with self._lock:
                self._counts.hits += 1
                self._counts.bytes_read += self._ledger.page_bytes
        return image

    def peek(self, key: Key) -> Buffer | None:
        """As `get`, and nobody asked."""
        return self._images.get(key)

    def put(self, key: Key, image: Buffer) -> list[tuple[Key, Buffer]]:
        """Keeps the image; returns what has no room any more, which may be it."""
        num_bytes = memoryview(image).nbytes
        if num_bytes != self._ledger.page_bytes:
            raise ValueError(
                f"an image of {num_bytes} bytes; this tier's have {self._ledger.page_bytes}"
            )
        with self._lock:
            if key in self._images:
                self._ledger.use([key])
                return []
            gone = self._ledger.evict(1) if self._ledger.num_free < 1 else []
            for _ in gone:
                self._ledger.release()
            self._counts.evicted += len(gone)
            left = [(other, self._images.pop(other)) for other in gone]
            if self._ledger.num_free < 1:
                return [(key, image)]
            self._ledger.enter(key)
            self._images[key] = image
            self._counts.written += 1
            self._counts.bytes_written += num_bytes
            return left

    def newest_first(self) -> list[tuple[Key, Buffer]]:
        """All pages, the most recently used first."""
        with self._lock:
            return [(key, self._images[key]) for key in reversed(self._ledger.keys())]

    def use(self, keys: Sequence[Key]) -> None:
        """A sequence's pages, given from its start, were used."""
        with self._lock:
            self._ledger.use(keys)

    def pin(self, keys: Sequence[Key]) -> None:
        """Keeps the pages, here or yet to come, until `unpin` (PinsExceedBudget)."""
        with self._lock:
            self._ledger.pin(keys)

    def unpin(self, keys: Sequence[Key]) -> None:
        with self._lock:
            self._ledger.unpin(keys)

    def is_pinned(self, key: Key) -> bool:
        return self._ledger.is_pinned(key)

    def clear(self) -> list[Buffer]:
        """Forgets all pages that aren't pinned. Returns their images, which take long to free: so
        that the caller does, holding no lock."""
        with self._lock:
            gone = self._ledger.clear()
            for _ in gone:
                self._ledger.release()
            return [self._images.pop(key) for key in gone]

    def follow(self, on_change: OnChange) -> None:
        """Tells of the pages that are here, and from then on of each change."""
        with self._lock:
            self._ledger.follow(on_change)

    def report(self, decisions: Decisions) -> TierReport:
        with self._lock:
            return TierReport(
                name=self.name,
                num_pages=len(self._ledger),
                num_pinned=self._ledger.num_pinned,
                page_bytes=self._ledger.page_bytes,
                budget_bytes=self._ledger.budget_bytes,
                num_queued=0,
                is_off=False,
                counts=self._counts.copy(),
                decisions=decisions,
            )
