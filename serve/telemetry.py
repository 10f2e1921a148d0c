"""Distributions of what a server is judged by: the times of its requests.

It does not know how they are shown (`serve/api/http_server.py`) or where a step's time goes
(`serve/profile.py`).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SECONDS = tuple(float(f"{digit}e{power}") for power in range(-5, 4) for digit in (1, 2, 5))
"""1, 2, 5 in each decade: a part of a step takes tens of microseconds, a request up to an hour."""


class Histogram:
    """How many observations fell into each bucket. One thread observes, any may read."""

    # A tenth of what prometheus_client's costs: no lock and no labels to look up.

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        """`bounds` are the largest values of each bucket, ascending; a last one takes the rest."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0
        """The sum of what was observed."""

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def __add__(self, other: "Histogram") -> "Histogram":
        assert self.bounds == other.bounds, "only like buckets add up"
        both = Histogram(self.bounds)
        both.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        both.total = self.total + other.total
        return both


@dataclass(frozen=True)
class Series:
    """A histogram under the name by which it is exported."""

    name: str
    histogram: Histogram
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


def add_up(replicas: Sequence[Sequence[Series]]) -> list[Series]:
    """The series of several engines as one's; each tells the same ones, in the same order."""
    sums = list(replicas[0])
    for others in replicas[1:]:
        sums = [
            Series(mine.name, mine.histogram + theirs.histogram, mine.labels)
            for mine, theirs in zip(sums, others, strict=True)
        ]
    return sums


@dataclass(slots=True)
class RequestClock:
    """When a request arrived and was last given tokens."""

    arrived_s: float
    last_token_s: float | None = None


class RequestTimes:
    """Times of an engine's requests as its clients would take them beside it, without a network."""

    def __init__(self) -> None:
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self.whole = Histogram()

    def given(self, request: RequestClock, num_tokens: int, now_s: float) -> None:
        """The request is given tokens; those that come together share the time they took."""
        if request.last_token_s is None:
            self.first_token.observe(now_s - request.arrived_s)
        else:
            self.between_tokens.observe((now_s - request.last_token_s) / num_tokens, num_tokens)
        request.last_token_s = now_s

    def served(self, request: RequestClock, now_s: float) -> None:
        """The request was answered in full."""
        self.whole.observe(now_s - request.arrived_s)

    def series(self) -> list[Series]:
        return [
            Series("time_to_first_token_seconds", self.first_token),
            Series("inter_token_latency_seconds", self.between_tokens),
            Series("e2e_request_latency_seconds", self.whole),
        ]
