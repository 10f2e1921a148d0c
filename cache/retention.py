"""Which pages requests asked to be kept, and until when.

It pins nothing, and does not know where pages lie.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cache.contexts.deadlines import Deadlines
from cache.keys import Key

TTLS_S = {"5m": 300.0, "1h": 3600.0}
DEFAULT_TTL = "5m"
MAX_BREAKPOINTS = 4


class InvalidRetention(ValueError):
    """Breakpoints that can't be kept."""


class Breakpoint(NamedTuple):
    position: int
    """Of the prompt, the tokens before it are to be kept."""
    ttl_s: float


class Retention(NamedTuple):
    """What a request asks to be kept of its prompt."""

    breakpoints: tuple[Breakpoint, ...]

    @classmethod
    def parse(cls, breakpoints: Sequence[tuple[int, str]], num_tokens: int) -> "Retention":
        """Of positions in a prompt of `num_tokens`, and "5m" or "1h". Raises InvalidRetention."""
        if len(breakpoints) > MAX_BREAKPOINTS:
            raise InvalidRetention(
                f"{len(breakpoints)} breakpoints; at most {MAX_BREAKPOINTS} are possible, and the "
                "last one covers what comes before it"
            )
        last = 0
        for position, ttl in breakpoints:
            if not last < position <= num_tokens:
                raise InvalidRetention(
                    f"a breakpoint at token {position} after {last}; positions must ascend, from 1 "
                    f"to the prompt's {num_tokens} tokens"
                )
            if ttl not in TTLS_S:
                raise InvalidRetention(
                    f"the ttl of the breakpoint at token {position} is {ttl!r}; it must be one of "
                    f"{', '.join(TTLS_S)}"
                )
            last = position
        return cls(tuple(Breakpoint(position, TTLS_S[ttl]) for position, ttl in breakpoints))

    def page_ttls_s(self, page_size: int) -> list[float]:
        """For how long to keep each full page before the last breakpoint: never less than one
        after it, which stands on it."""
        ttls_s: list[float] = []
        for i, (position, _) in enumerate(self.breakpoints):
            longest_s = max(ttl_s for _, ttl_s in self.breakpoints[i:])
            ttls_s += [longest_s] * (position // page_size - len(ttls_s))
        return ttls_s


class Retained:
    """Up to `max_keys` pages to keep. The caller's clock is monotonic."""

    def __init__(self, max_keys: int) -> None:
        self.num_refused = 0
        """Pages that there was no room for."""
        self._max_keys = max_keys
        self._ttl_s: dict[Key, float] = {}
        """The longest that was asked for since the page is kept: what a use renews."""
        self._ends = Deadlines[bytes]()

    def __len__(self) -> int:
        return len(self._ends)

    def until_s(self, key: Key) -> float | None:
        """The time from which the page need not be kept; None if nobody asked, or `expire`
        has returned it."""
        return self._ends.get(key)

    def keep(self, keys: Sequence[Key], ttls_s: Sequence[float], now_s: float) -> list[Key]:
        """Keeps the beginning of a sequence's pages, each for its time (`Retention.page_ttls_s`).

        Returns those that were not kept before. Where there is no room, pages at the end are
        refused.
        """
        new: list[Key] = []
        kept = min(len(keys), len(ttls_s))
        for number, (key, ttl_s) in enumerate(zip(keys, ttls_s, strict=False)):
            end_s = self._ends.get(key)
            if end_s is None:
                if len(self._ends) >= self._max_keys:
                    self.num_refused += kept - number
                    break
                new.append(key)
            elif now_s < end_s:
                ttl_s = max(ttl_s, self._ttl_s[key])
            self._renew(key, ttl_s, now_s)
        return new

    def use(self, keys: Iterable[Key], now_s: float) -> None:
        """A request used these pages of a sequence, given from its start: their time begins
        anew."""
        for key in keys:
            end_s = self._ends.get(key)
            if end_s is None or end_s <= now_s:
                break  # what stands on it ends no later
            self._renew(key, self._ttl_s[key], now_s)

    def expire(self, now_s: float) -> list[Key]:
        """Those whose time is over, each once."""
        over = self._ends.take_due(now_s)
        for key in over:
            del self._ttl_s[key]
        return over

    def refuse(self, keys: Sequence[Key]) -> None:
        """Takes back what `keep` returned last: there was no room after all."""
        for key in keys:
            self._ends.remove(key)
            del self._ttl_s[key]
        self.num_refused += len(keys)

    def _renew(self, key: Key, ttl_s: float, now_s: float) -> None:
        self._ttl_s[key] = ttl_s
        self._ends.set(key, now_s + ttl_s)
