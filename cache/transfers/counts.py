"""What is counted of transfers: how they ended, and what they brought."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """How it went with a prompt that another engine might have computed."""

    SHORT = "short"
    """It was computed here, being short."""
    NOBODY = "nobody"
    """It was computed here: no engine could be asked."""
    COMPLETE = "complete"
    BROKEN = "broken"
    """What came was damaged, out of order or too little."""
    FAILED = "failed"
    """The other engine refused, failed or vanished."""
    LATE = "late"
    """Nothing came for as long as the lease."""
    CANCELLED = "cancelled"
    """The request ended before."""


@dataclass
class TransferCounts:
    """Since the start."""

    outcomes: Counter[Outcome] = field(default_factory=Counter[Outcome])
    """Of transfers; one that is tried with two engines has two."""
    pages: int = 0
    """Received."""
    bytes: int = 0
    """Received; of pages that stay on devices, none."""
