"""What a server's cache holds, kept up to date by its events: what a router looks up.

It does not know prompts, or how a page is named. It knows no connection.
"""

from serve.client.values import CacheChange, CacheEvents


class CacheView:
    """Of one server. Not for several threads at once."""

    def __init__(self) -> None:
        self._epoch, self._sequence_number = "", 0
        self._is_complete = False
        self._held: dict[tuple[int, str], set[bytes]] = {}
        """Keys, by replica and tier."""

    @property
    def is_complete(self) -> bool:
        """What it answers is all that was held at some moment: a snapshot has come whole."""
        return self._is_complete

    @property
    def epoch(self) -> str:
        """What to go on after, with `sequence_number`; empty while there is nothing whole."""
        return self._epoch if self._is_complete else ""

    @property
    def sequence_number(self) -> int:
        return self._sequence_number if self._is_complete else 0

    def apply(self, message: CacheEvents) -> None:
        """Takes in what comes next. Raises ValueError where that is not what comes next."""
        is_other = message.epoch != self._epoch
        if message.is_snapshot:
            if self._is_complete or is_other or message.sequence_number != self._sequence_number:
                self._held.clear()
            self._is_complete = message.is_snapshot_end
        else:
            before = message.sequence_number - len(message.events)
            if not self._is_complete or is_other or before != self._sequence_number:
                raise ValueError(
                    f"events after {before} of epoch {message.epoch!r} don't follow those up to "
                    f"{self.sequence_number} of {self.epoch!r}; subscribe with the view's epoch "
                    "and sequence_number, and apply every message"
                )
        self._epoch, self._sequence_number = message.epoch, message.sequence_number
        for event in message.events:
            keys = self._held.setdefault((event.replica, event.tier), set())
            match event.change:
                case CacheChange.STORED:
                    keys.add(event.key)
                case CacheChange.REMOVED:
                    keys.discard(event.key)
                case CacheChange.CLEARED:
                    keys.clear()

    def tiers_of(self, key: bytes, replica: int) -> set[str]:
        """Where a replica has the page."""
        return {
            tier for (whose, tier), keys in self._held.items() if whose == replica and key in keys
        }

    def holds(self, key: bytes) -> bool:
        """Whether any replica has the page anywhere."""
        return any(key in keys for keys in self._held.values())

    def keys(self, replica: int, tier: str) -> frozenset[bytes]:
        """All pages that are held there."""
        return frozenset(self._held.get((replica, tier), ()))
