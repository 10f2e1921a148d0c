"""What is counted of a tier: how reads, writes and decisions ended.

It does not know how counts are shown.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class Miss(StrEnum):
    """Why a page that was asked of a tier did not come."""

    ABSENT = "absent"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    FOREIGN = "foreign"
    """Another model's, data type's or page size's."""
    OTHER_KEY = "other_key"
    OTHER_VERSION = "other_version"
    FAILED = "failed"
    """The store raised an error."""
    OFF = "off"
    """The tier is switched off after failures."""


class Drop(StrEnum):
    """Why a page that was given to a tier is not in it."""

    QUEUE_FULL = "queue_full"
    NO_ROOM = "no_room"
    """The budget is taken by pinned pages and by writes under way."""
    FAILED = "failed"
    OFF = "off"
    CLOSED = "closed"


@dataclass
class TierCounts:
    """Since the start; pages unless said otherwise. Their owner's lock guards them."""

    hits: int = 0
    bytes_read: int = 0
    misses: Counter[Miss] = field(default_factory=Counter[Miss])
    written: int = 0
    bytes_written: int = 0
    drops: Counter[Drop] = field(default_factory=Counter[Drop])
    evicted: int = 0
    errors: Counter[str] = field(default_factory=Counter[str])
    """By reason: of the store, each counted once, whatever was lost by it."""

    def copy(self) -> "TierCounts":
        return TierCounts(
            self.hits,
            self.bytes_read,
            self.misses.copy(),
            self.written,
            self.bytes_written,
            self.drops.copy(),
            self.evicted,
            self.errors.copy(),
        )


@dataclass
class Decisions:
    """How it was decided where a run of pages that a tier has comes from."""

    fetched: int = 0
    recomputed: int = 0
    abandoned: int = 0
    """Of those fetched: given up since computing the rest became faster."""
    probed: int = 0
    """Reads beside requests, to learn what a tier would take."""


@dataclass(frozen=True)
class TierReport:
    """A tier at one moment."""

    name: str
    num_pages: int
    num_pinned: int
    page_bytes: int
    """What a page takes of the budget."""
    budget_bytes: int
    num_queued: int
    """Pages on their way in."""
    is_off: bool
    """Not read, or not written, for a while, after failures."""
    counts: TierCounts
    decisions: Decisions
