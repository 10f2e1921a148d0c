"""Many short requests to an engine that has its prompts computed elsewhere, with cancels and kills.

What comes of each is compared with one engine's tokens, and in the end no page may have an owner.
It does not know how pages travel.
"""

import heapq
import queue
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from cache.transfers.counts import Outcome
from serve.request import FinishReason, GenerateRequest, Load, Output, SamplingParams

RANDOM_MODEL = {
    "arch": "llama",
    "hidden": 64,
    "mlp": 128,
    "layers": 2,
    "heads": 4,
    "kv-heads": 2,
    "vocab": 512,
    "context": 512,
    "dtype": "float32",
    "seed": 0,
}
"""Computing is not what is tried."""
PREFIX_TOKENS = 96
NUM_PREFIXES = 4
SHARED = 0.3
"""Of the prompts begin with one of a few prefixes."""
MOST_PROMPT, MOST_ANSWER = 200, 80
"""Tokens of a prompt's own, and of an answer."""
CALM_S = 0.2
"""Between requests from a kill until a prompt has come over again: the side that computes takes
seconds to start, in which all requests would be over."""
LET_GO_S = 30.0
POLL_S = 0.5


class Server(Protocol):
    """The side that computes prompts, where it is a process."""

    def kill(self) -> None: ...
    def start(self) -> None: ...


@dataclass(frozen=True)
class Soak:
    """What is asked for."""

    num_requests: int = 1000
    cancel_share: float = 0.1
    num_kills: int = 5
    num_open: int = 16
    """At once."""

    @property
    def longest(self) -> int:
        """Tokens of a request, with its answer."""
        return PREFIX_TOKENS + MOST_PROMPT + MOST_ANSWER

    def requests(self, vocab_size: int) -> list[GenerateRequest]:
        """Half of them greedy, half sampled."""
        rng = random.Random("soak")

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(rng.choices(range(vocab_size), k=count))

        prefixes = [tokens(PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]
        found: list[GenerateRequest] = []
        for i in range(self.num_requests):
            prefix = rng.choice(prefixes) if rng.random() < SHARED else ()
            sampling = SamplingParams(
                temperature=rng.choice([0.0, 0.8]),
                seed=i,
                max_tokens=rng.randint(1, MOST_ANSWER),
                ignore_eos=True,
            )
            prompt = prefix + tokens(rng.randint(1, MOST_PROMPT))
            found.append(GenerateRequest(f"soak {i}", prompt, sampling))
        return found


@dataclass(frozen=True)
class Soaked:
    """What came of it."""

    way: str
    num_answered: int
    """With one engine's tokens."""
    num_cancelled: int
    """By us, with a beginning of them."""
    wrong: list[str]
    """Requests with other tokens."""
    lost: list[str]
    """That ended otherwise."""
    num_kills: int
    outcomes: Mapping[str, int]
    """Of transfers."""
    pages_left: Mapping[str, int]
    """With owners in the end, by side."""
    compiled_late: Mapping[str, int]
    num_preemptions: int
    seconds: float

    @property
    def is_clean(self) -> bool:
        """Nothing lost, wrong, left behind, or compiled after the start."""
        return not (
            self.wrong
            or self.lost
            or any(self.pages_left.values())
            or any(self.compiled_late.values())
        )


def soak(
    engine: Any,
    expected: Mapping[str, Sequence[int]],
    asked: Soak,
    loads: Mapping[str, Callable[[], Load | None]],
    way: str,
    server: Server | None = None,
) -> Soaked:
    """Gives `engine` the requests of `asked`, whose tokens are `expected`.

    `loads` tells how busy each side is, None while it is not there. `server`, if there is one, is
    killed and started again.
    """
    started_s = time.monotonic()
    clients = _Clients(engine, asked, server)
    clients.run(asked.requests(engine.info.vocab_size))
    pages_left = {side: _left(load) for side, load in loads.items()}
    ended = [load() for load in loads.values()]
    found = clients.compare(expected)
    return Soaked(
        way=way,
        num_answered=found.num_answered,
        num_cancelled=found.num_cancelled,
        wrong=found.wrong,
        lost=found.lost,
        num_kills=clients.num_kills,
        outcomes={outcome.value: num for outcome, num in _outcomes(engine).items()},
        pages_left=pages_left,
        compiled_late={
            side: load.compiles_after_warmup
            for side, load in zip(loads, ended, strict=True)
            if load is not None
        },
        num_preemptions=engine.load().num_preemptions,
        seconds=time.monotonic() - started_s,
    )


@dataclass
class _Compared:
    num_answered: int = 0
    num_cancelled: int = 0
    wrong: list[str] = field(default_factory=list[str])
    lost: list[str] = field(default_factory=list[str])


class _Clients:
    """Those who ask, some of whom go away."""

    def __init__(self, engine: Any, asked: Soak, server: Server | None) -> None:
        self._engine, self._asked, self._server = engine, asked, server
        self._rng = random.Random("cancels and kills")
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._sent_s: dict[str, float] = {}
        """Of requests that are open."""
        self._took_s: list[float] = [0.05]
        self._aborts: list[tuple[float, str]] = []
        """When to abort which request: a heap."""
        self._aborted: set[str] = set()
        self._tokens: dict[str, list[int]] = {}
        self._reasons: dict[str, FinishReason] = {}
        self._num_over_before = 0
        """Prompts that had come over at the last kill."""
        self.num_kills = 0

    def run(self, requests: Sequence[GenerateRequest]) -> None:
        kills = self._kills(len(requests))
        for i, request in enumerate(requests):
            if i in kills:
                self._kill()
            calm_until_s = time.monotonic() + (CALM_S if self._is_calm else 0.0)
            while len(self._sent_s) >= self._asked.num_open or time.monotonic() < calm_until_s:
                self._turn(calm_until_s)
            self._send(request)
        while self._sent_s:
            self._turn()

    def compare(self, expected: Mapping[str, Sequence[int]]) -> _Compared:
        found = _Compared()
        for name, tokens in self._tokens.items():
            all_of_them, reason = list(expected[name]), self._reasons[name]
            if reason is FinishReason.LENGTH and tokens == all_of_them:
                found.num_answered += 1
            elif reason is FinishReason.CANCELLED and name in self._aborted:
                found.num_cancelled += 1
                if tokens != all_of_them[: len(tokens)]:
                    found.wrong.append(name)
            else:
                (found.wrong if reason is FinishReason.LENGTH else found.lost).append(name)
        return found

    @property
    def _is_calm(self) -> bool:
        """Nothing has come over since the last kill."""
        num_over = _outcomes(self._engine)[Outcome.COMPLETE]
        return self.num_kills > 0 and num_over == self._num_over_before

    def _kills(self, num_requests: int) -> set[int]:
        """Before which requests the server is killed: once in each of as many parts."""
        if self._server is None or not self._asked.num_kills:
            return set()
        rng, part = random.Random("kills"), num_requests / (self._asked.num_kills + 1)
        return {round(part * (i + 0.5 + rng.random())) for i in range(self._asked.num_kills)}

    def _kill(self) -> None:
        assert self._server is not None, "nobody else is killed"
        self._server.kill()
        self._server.start()
        self.num_kills += 1
        self._num_over_before = _outcomes(self._engine)[Outcome.COMPLETE]

    def _send(self, request: GenerateRequest) -> None:
        name, now_s = request.request_id, time.monotonic()
        self._sent_s[name] = now_s
        self._tokens[name] = []
        self._engine.submit(request, self._outputs.put)
        if self._rng.random() < self._asked.cancel_share:
            # At any moment of the time that requests take.
            after_s = self._rng.uniform(0, median(self._took_s[-100:]))
            heapq.heappush(self._aborts, (now_s + after_s, name))

    def _turn(self, until_s: float = float("inf")) -> None:
        """Ends what is to end by now, and takes what comes next, if it comes soon."""
        now_s = time.monotonic()
        while self._aborts and self._aborts[0][0] <= now_s:
            _, name = heapq.heappop(self._aborts)
            self._aborted.add(name)
            self._engine.abort(name)
        next_s = min(until_s, now_s + POLL_S, *(at_s for at_s, _ in self._aborts[:1]))
        try:
            output = self._outputs.get(timeout=max(next_s - now_s, 0.001))
        except queue.Empty:
            return
        self._tokens[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            self._reasons[output.request_id] = output.finish_reason
            self._took_s.append(time.monotonic() - self._sent_s.pop(output.request_id))


def _outcomes(engine: Any) -> Mapping[Outcome, int]:
    return engine.transfers()[0].outcomes


def _left(load: Callable[[], Load | None]) -> int:
    """Pages with an owner once none has, or after LET_GO_S."""
    deadline_s = time.monotonic() + LET_GO_S
    while True:
        now = load()
        if now is not None and (now.pages_used == 0 or time.monotonic() > deadline_s):
            return now.pages_used
        if time.monotonic() > deadline_s + LET_GO_S:
            raise TimeoutError("a side did not say how many pages it has")
        time.sleep(0.05)
