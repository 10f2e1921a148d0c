"""What the device and the tiers of all replicas hold, told as numbered events to who follows.

Whoever holds pages (`prefix_index.py`, `tiers/`) tells of each change by an `OnChange`. Nobody is
asked to before somebody subscribes; from then on the log knows all that is held, so that there is
no gap between a snapshot and the events after it. It does not know why a page comes or goes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import batched, islice, repeat
from threading import Lock
from typing import Any, NamedTuple, Protocol

from cache.keys import Key

DEVICE = "device"
NUM_KEPT = 65_536
"""Events kept for those who read late or come back: up to twice as many, of 32 bytes and a name."""


class Change(StrEnum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"
    """All pages are gone."""


class OnChange(Protocol):
    def __call__(
        self, change: Change, keys: Sequence[Key] = (), parents: Sequence[Key] = ()
    ) -> None:
        """Of pages that are stored or removed, their names; of stored ones also their parents'
        names, where the holder knows them."""
        ...


type Follow = Callable[[OnChange], None]
"""Asks a holder to tell what it has now, and from then on each change: under one lock, so that the
two follow each other."""


class Event(NamedTuple):
    change: Change
    tier: str
    replica: int
    key: Key = b""
    parent_key: Key = b""
    num_tokens: int = 0
    """These two of what is stored on a device."""


@dataclass(frozen=True)
class Batch:
    """Successive events; of a snapshot, pages that are held."""

    sequence_number: int
    """Of the last event; of a snapshot, of the last one before it."""
    events: list[Event]
    is_snapshot: bool = False
    is_snapshot_end: bool = False
    """It is the snapshot's last one."""


class FellBehind(Exception):
    """Events that a reader has yet to be given are no longer kept."""


@dataclass(frozen=True)
class _Holder:
    tier: str
    replica: int
    page_size: int
    follow: Follow
    held: dict[Key, Key] = field(default_factory=dict[Key, Key])
    """Each page's parent."""

    def event(self, change: Change, key: Key, parent: Key) -> Event:
        num_tokens = self.page_size if change is Change.STORED else 0
        return Event(change, self.tier, self.replica, key, parent, num_tokens)


_FIELDS = 4
"""Of an event in the log: the change, its holder, the page's name and its parent's."""


class EventLog:
    """The events of a process's start. Any thread may call; nobody waits for a reader."""

    def __init__(self, epoch: str, num_kept: int = NUM_KEPT) -> None:
        """`epoch` is this start's own: numbers of another mean nothing."""
        self.epoch, self._num_kept = epoch, num_kept
        self._holders: dict[tuple[int, str], _Holder] = {}
        self._fields: list[Any] = []
        """Of all events that are kept, one after the other: with an object for each, collecting
        garbage would take as long as all else."""
        self._num_dropped = 0
        """Events before these."""
        self._waiting: dict[Subscription, Callable[[], None]] = {}
        self._lock = Lock()
        """Guards all of these, and what holders hold. Taken last: holders tell under their own."""
        self._is_followed = False
        self._starting = Lock()
        """Guards it; taken first."""

    def add(self, replica: int, tier: str, follow: Follow, page_size: int = 0) -> None:
        """Names somebody who holds pages; before anybody subscribes."""
        assert not self._is_followed, "its pages would be missing from snapshots"
        if (replica, tier) in self._holders:
            raise ValueError(f"replica {replica} has two tiers {tier!r}; give one another name")
        self._holders[replica, tier] = _Holder(tier, replica, page_size, follow)

    def subscribe(self, epoch: str = "", sequence_number: int = 0) -> "Subscription":
        """Goes on after an event where that is possible, else begins with a snapshot."""
        with self._starting:
            if not self._is_followed:
                self._is_followed = True
                for holder in self._holders.values():
                    holder.follow(self._teller(holder))
        with self._lock:
            last = self._last()
            if epoch == self.epoch and self._num_dropped <= sequence_number <= last:
                return Subscription(self, sequence_number)
            held = [(holder, holder.held.copy()) for holder in self._holders.values()]
            return Subscription(self, last, held)

    def since(self, sequence_number: int, most: int) -> list[Event]:
        """Up to `most` events after that one (FellBehind)."""
        with self._lock:
            first, last = sequence_number - self._num_dropped, self._last()
            if first < 0:
                raise FellBehind(
                    f"the reader is {last - sequence_number} cache events behind, and "
                    f"{last - self._num_dropped} are kept; subscribe again, and read faster"
                )
            fields = self._fields[first * _FIELDS : (first + most) * _FIELDS]
        return [
            holder.event(change, key, parent)
            for change, holder, key, parent in batched(fields, _FIELDS)
        ]

    def call_when_more(
        self, who: "Subscription", sequence_number: int, wake: Callable[[], None]
    ) -> None:
        """Calls `wake` once there are events after that one: from any thread, under the locks of
        whoever tells of it."""
        with self._lock:
            if self._last() == sequence_number:
                self._waiting[who] = wake
                return
        wake()

    def forget(self, who: "Subscription") -> None:
        with self._lock:
            self._waiting.pop(who, None)

    def _last(self) -> int:
        """The number of the last event."""
        return self._num_dropped + len(self._fields) // _FIELDS

    def _teller(self, holder: _Holder) -> OnChange:
        held, fields = holder.held, self._fields
        most_fields = 2 * self._num_kept * _FIELDS

        def on_change(
            change: Change, keys: Sequence[Key] = (), parents: Sequence[Key] = ()
        ) -> None:
            with self._lock:
                if change is Change.CLEARED:
                    held.clear()
                    fields.extend((change, holder, b"", b""))
                for key, parent in zip(keys, parents or repeat(b""), strict=False):
                    if change is Change.STORED:
                        held[key] = parent
                    else:
                        del held[key]
                    fields.extend((change, holder, key, parent))
                while len(fields) >= most_fields:
                    # By halves: one at a time would move all the others each time.
                    del fields[: most_fields // 2]
                    self._num_dropped += self._num_kept
                if not self._waiting:
                    return
                waiting, self._waiting = self._waiting, {}
            for wake in waiting.values():
                wake()

        return on_change


class Subscription:
    """Where one reader is. One thread at a time may call."""

    def __init__(
        self,
        log: EventLog,
        sequence_number: int,
        held: list[tuple[_Holder, dict[Key, Key]]] | None = None,
    ) -> None:
        """`held`: what a snapshot shows, taken when that was the last event."""
        self._log, self._sequence_number = log, sequence_number
        self._num_left = 0 if held is None else sum(len(pages) for _, pages in held)
        self._snapshot = None if held is None else _stored(held)

    def take(self, most: int) -> Batch | None:
        """What comes next, up to `most` events; None while there is nothing.

        Raises FellBehind, from then on each time.
        """
        if self._snapshot is not None:
            return self._take_snapshot(self._snapshot, most)
        events = self._log.since(self._sequence_number, most)
        if not events:
            return None
        self._sequence_number += len(events)
        return Batch(self._sequence_number, events)

    def call_when_more(self, wake: Callable[[], None]) -> None:
        """Calls `wake` once, from any thread, when `take` has more to give. It must not wait."""
        self._log.call_when_more(self, self._sequence_number, wake)

    def close(self) -> None:
        """`wake` is not called any more."""
        self._log.forget(self)

    def _take_snapshot(self, snapshot: Iterator[Event], most: int) -> Batch:
        events = list(islice(snapshot, most))
        self._num_left -= len(events)
        is_end = not self._num_left
        if is_end:
            self._snapshot = None
        return Batch(self._sequence_number, events, is_snapshot=True, is_snapshot_end=is_end)


def _stored(held: list[tuple[_Holder, dict[Key, Key]]]) -> Iterator[Event]:
    for holder, pages in held:
        for key, parent in pages.items():
            yield holder.event(Change.STORED, key, parent)
