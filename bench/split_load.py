"""Long prompts that come among others' streams, played to an engine, and what clients notice.

It does not know how an engine computes prompts, or where.
"""

import queue
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.outputs import outputs_of
from serve.errors import RequestError
from serve.request import FinishReason, GenerateRequest, Output, SamplingParams

LIMIT = 5.0
"""A request is well served whose first token, and 99% of whose gaps, take no more than as many
times what they take where there is no other load."""
NUM_ALONE = 5
"""Requests whose median says what that is."""
POLL_S = 0.2
IDLE_S = 60.0
"""For requests that were aborted to end."""


@dataclass(frozen=True)
class Load:
    """What is asked for in a round."""

    num_prompt: int = 768
    """Tokens of a long prompt."""
    num_prompts: int = 8
    num_after: int = 16
    """Tokens that follow a long prompt."""
    num_streams: int = 4
    """Others that decode, each followed by another when its answer is long enough."""
    num_asked: int = 16
    """Tokens of a stream's prompt."""
    num_answered: int = 256
    """Of its answer."""
    spacing: float = 4.0
    """Between long prompts, in the mean: in times of what the first token of one takes alone."""

    @property
    def longest(self) -> int:
        """Tokens of a request, with its answer."""
        return max(self.num_prompt + self.num_after, self.num_asked + self.num_answered)

    @property
    def num_cached(self) -> int:
        """Tokens of all requests that may be open at once."""
        return self.num_prompts * (self.num_prompt + self.num_after) + self.num_streams * (
            self.num_asked + self.num_answered
        )

    def long_request(self, name: str, vocab_size: int) -> GenerateRequest:
        return request_of(name, self.num_prompt, self.num_after, vocab_size)

    def arrivals_s(self, turn: str, gap_s: float) -> list[float]:
        """When long prompts come, since the start: a Poisson process."""
        rng, at_s = random.Random(f"arrivals {turn}"), 0.0
        return [at_s := at_s + rng.expovariate(1 / gap_s) for _ in range(self.num_prompts)]


def request_of(name: str, num_prompt: int, num_tokens: int, vocab_size: int) -> GenerateRequest:
    """Greedy, of a prompt that its name alone decides."""
    prompt = random.Random(name).choices(range(vocab_size), k=num_prompt)
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return GenerateRequest(name, tuple(prompt), sampling)


@dataclass
class Served:
    """A request, and when which of its tokens came."""

    request: GenerateRequest
    is_long: bool
    sent_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """Moments, and how many tokens came at each."""
    token_ids: list[int] = field(default_factory=list[int])
    ended_s: float | None = None

    @property
    def first_s(self) -> float:
        """From its sending to its first token."""
        return self.arrivals[0][0] - self.sent_s

    def gaps(self) -> Iterator["Gap"]:
        return gaps_of(self.arrivals)


class Gap(NamedTuple):
    """The time before one of a request's tokens, of which it has its share where several came at
    once."""

    from_s: float
    until_s: float
    share_s: float


def gaps_of(arrivals: Sequence[tuple[float, int]]) -> Iterator[Gap]:
    """Of all tokens but those that came first."""
    for (before_s, _), (at_s, num) in pairwise(arrivals):
        for _ in range(num):
            yield Gap(before_s, at_s, (at_s - before_s) / num)


@dataclass(frozen=True)
class Played:
    """A round with one engine."""

    served: list[Served]
    begin_s: float
    """Streams decode, and long prompts begin to come."""
    end_s: float
    """The last of them has its answer."""


@dataclass(frozen=True)
class Alone:
    """Seconds that things take where there is no other load."""

    long_first: float
    short_first: float
    gap: float
    """Of streams, without long prompts."""


@dataclass(frozen=True)
class Figures:
    """Of a round, or medians of several; seconds, but for the last two."""

    gap_p50: float
    """Between a stream's tokens, while a long prompt waits for its first; so is the next."""
    gap_p99: float
    all_p50: float
    """The same at all times; so is the next."""
    all_p99: float
    long_p50: float
    """To first tokens of long prompts; of few, p99 is nearly the worst."""
    long_p99: float
    short_p50: float
    short_p99: float
    tokens_per_s: float
    """Of all requests."""
    goodput: float
    """Share of the requests that ended which were served within LIMIT."""


def play(
    engine: Any,
    load: Load,
    turn: str,
    gap_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Played:
    """A round: the same requests of the same names for the same `turn`. Raises RequestError."""
    return _Player(engine, load, turn, clock).run(load.arrivals_s(turn, gap_s))


def measure_alone(engine: Any, load: Load) -> Alone:
    """Raises RequestError."""
    vocab_size = engine.info.vocab_size

    def first_s(name: str, num_prompt: int) -> float:
        sent_s = time.perf_counter()
        return outputs_of(engine, [request_of(name, num_prompt, 1, vocab_size)])[0][0] - sent_s

    streams = [
        request_of(f"alone, stream {i}", load.num_asked, load.num_answered, vocab_size)
        for i in range(load.num_streams)
    ]
    arrivals: dict[str, list[tuple[float, int]]] = {}
    for at_s, output in outputs_of(engine, streams):
        if output.token_ids:
            arrivals.setdefault(output.request_id, []).append((at_s, len(output.token_ids)))
    return Alone(
        median(first_s(f"alone, long {i}", load.num_prompt) for i in range(NUM_ALONE)),
        median(first_s(f"alone, short {i}", load.num_asked) for i in range(NUM_ALONE)),
        median(gap.share_s for own in arrivals.values() for gap in gaps_of(own)),
    )


def figures_of(played: Played, alone: Alone) -> Figures:
    """What clients noticed. Raises RequestError where too little happened to say."""
    longs = [one for one in played.served if one.is_long]
    streams = [one for one in played.served if not one.is_long]
    ended = [
        one
        for one in played.served
        if one.ended_s is not None and played.begin_s <= one.ended_s <= played.end_s
    ]
    shorts = [
        one.first_s
        for one in streams
        if one.arrivals and played.begin_s <= one.sent_s and one.arrivals[0][0] <= played.end_s
    ]
    gaps = [
        gap
        for one in streams
        for gap in one.gaps()
        if played.begin_s <= gap.until_s <= played.end_s
    ]
    waits = [(one.sent_s, one.arrivals[0][0]) for one in longs]
    beside = [
        gap.share_s
        for gap in gaps
        if any(gap.from_s < until_s and from_s < gap.until_s for from_s, until_s in waits)
    ]
    if not (beside and shorts):
        raise RequestError(
            "no stream got a token, or none began anew, while long prompts came; lower the tokens "
            "of streams' answers, or raise --prompts or --prompt"
        )
    num_tokens = sum(
        num
        for one in played.served
        for at_s, num in one.arrivals
        if played.begin_s <= at_s <= played.end_s
    )
    return Figures(
        *_p50_p99(beside),
        *_p50_p99([gap.share_s for gap in gaps]),
        *_p50_p99([one.first_s for one in longs]),
        *_p50_p99(shorts),
        tokens_per_s=num_tokens / (played.end_s - played.begin_s),
        goodput=sum(_is_good(one, alone) for one in ended) / len(ended),
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    return Figures(*(median(getattr(r, f.name) for r in rounds) for f in fields(Figures)))


def ratios(ours: Sequence[Figures], others: Sequence[Figures]) -> Figures:
    """Medians of each round's own ratio to the others' figure of that round."""
    each = [
        Figures(*(_ratio(getattr(a, f.name), getattr(b, f.name)) for f in fields(Figures)))
        for a, b in zip(ours, others, strict=True)
    ]
    return medians(each)


class _Player:
    """The clients of one round."""

    def __init__(self, engine: Any, load: Load, turn: str, clock: Callable[[], float]) -> None:
        self._engine, self._load, self._turn, self._clock = engine, load, turn, clock
        self._arrivals: queue.SimpleQueue[tuple[float, Output]] = queue.SimpleQueue()
        self._served: dict[str, Served] = {}
        self._followers: dict[str, tuple[int, int]] = {}
        """Of each stream that is open, its number and that of who follows it."""
        self._longs_open: set[str] = set()

    def run(self, arrivals_s: Sequence[float]) -> Played:
        load = self._load
        for i in range(load.num_streams):
            # They end at different times, so that a step's work for them stays the same.
            self._begin_stream(i, 0, load.num_answered * (i + 1) // load.num_streams)
        first = list(self._served.values())
        while not all(one.arrivals for one in first):
            self._take(POLL_S)
        begin_s = self._clock()
        due = deque(begin_s + at_s for at_s in arrivals_s)
        num_sent = 0
        while due or self._longs_open:
            now_s = self._clock()
            if due and due[0] <= now_s:
                due.popleft()
                self._send_long(num_sent)
                num_sent += 1
            else:
                self._take(min(POLL_S, due[0] - now_s) if due else POLL_S)
        end_s = self._clock()
        for name in self._followers:
            self._engine.abort(name)
        if not self._engine.wait_idle(IDLE_S):
            raise RequestError(f"aborted requests still run after {IDLE_S:.0f} s")
        return Played(list(self._served.values()), begin_s, end_s)

    def _begin_stream(self, number: int, generation: int, num_tokens: int) -> None:
        name = f"{self._turn}, stream {number}, {generation}"
        self._followers[name] = (number, generation + 1)
        vocab_size = self._engine.info.vocab_size
        self._submit(request_of(name, self._load.num_asked, num_tokens, vocab_size), is_long=False)

    def _send_long(self, number: int) -> None:
        name = f"{self._turn}, long {number}"
        self._longs_open.add(name)
        self._submit(self._load.long_request(name, self._engine.info.vocab_size), is_long=True)

    def _submit(self, request: GenerateRequest, *, is_long: bool) -> None:
        self._served[request.request_id] = Served(request, is_long, self._clock())
        self._engine.submit(request, lambda output: self._arrivals.put((self._clock(), output)))

    def _take(self, timeout_s: float) -> None:
        """What comes next, if it comes soon. Raises RequestError for a request that fails."""
        try:
            at_s, output = self._arrivals.get(timeout=timeout_s)
        except queue.Empty:
            return
        name = output.request_id
        one = self._served[name]
        if output.token_ids:
            one.arrivals.append((at_s, len(output.token_ids)))
            one.token_ids += output.token_ids
        if output.finish_reason is None:
            return
        if output.finish_reason is not FinishReason.LENGTH:
            raise RequestError(
                f"request {name!r} ended by {output.finish_reason.value}, not by its length: "
                f"{output.error or 'no reason given'}"
            )
        one.ended_s = at_s
        if one.is_long:
            self._longs_open.remove(name)
        else:
            self._begin_stream(*self._followers.pop(name), self._load.num_answered)


def _is_good(one: Served, alone: Alone) -> bool:
    first_s = alone.long_first if one.is_long else alone.short_first
    shares_s = [gap.share_s for gap in one.gaps()] or [0.0]
    _, p99_s = _p50_p99(shares_s)
    return one.first_s <= LIMIT * first_s and p99_s <= LIMIT * alone.gap


def _p50_p99(values: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return float(p50), float(p99)


def _ratio(ours: float, theirs: float) -> float:
    """Of shares that are 0 on both sides, 1."""
    if theirs == 0:
        return 1.0 if ours == 0 else float("inf")
    return ours / theirs
