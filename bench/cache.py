"""What the prefix cache saves: time to the first token of conversations and of long prefixes.

    weft bench cache

It does not know how pages are found (`cache/prefix_index.py`); a replay of arrivals against the
index alone is `bench/cache_replay.py`.
"""

import json
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.measure import Tell
from bench.offline import RANDOM_MODEL, describe
from bench.random_model import random_model
from bench.report import Machine, this_machine
from plan.machine import ROOT
from serve.build import build_engine
from serve.commands.devices import ensure_devices, keep_compiled_programs
from serve.config import ServeConfig, make_config, override_config
from serve.engine import ModelInfo
from serve.errors import RequestError
from serve.progress import Progress
from serve.request import FinishReason, GenerateRequest, Output, SamplingParams

CONTEXT = 8192
"""Of the random model."""
BARS = {"device": 0.2, "host": 0.35, "disk": 1.05}
"""Most of the time without the cache that a first token may take, by where the prefix is."""
HOST_GIB = 4.0
"""Of host memory, where prefixes are to stay there."""
LITTLE_GIB = 0.001
"""Where they are to pass through."""
PAGE_SIZE = 16
SETTLED_S = 0.3
"""Without a page on its way down."""


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    num_turns: int = 20
    num_cached: int = 4096
    """Tokens of the long prefix."""
    num_new: int = 32
    """Tokens that come after it, and that a turn adds."""
    num_answered: int = 16
    """Tokens of an answer."""
    runs: int = 5
    """Long prefixes; figures are medians of as many."""

    @property
    def longest(self) -> int:
        """Tokens of a request, with its answer."""
        turns = self.num_turns * (self.num_new + self.num_answered)
        return max(self.num_cached + self.num_new + self.num_answered, turns)


@dataclass(frozen=True)
class Turn:
    """Of a conversation."""

    num_prompt: int
    num_computed: int
    """Tokens of the prompt that were not found."""
    num_new: int
    """Tokens that nothing had computed before: what the turn adds, and the last token answered."""
    first_token_s: float
    uncached_s: float
    """To the first token of the same prompt where nothing of it is cached."""


@dataclass(frozen=True)
class Prefix:
    """A long one, cached somewhere."""

    where: str
    first_token_s: float
    uncached_s: float
    num_found: int
    """Tokens that were not computed, in the median: the others were faster to compute."""

    @property
    def share(self) -> float:
        return self.first_token_s / self.uncached_s


@dataclass(frozen=True)
class Report:
    model: str
    arguments: list[str]
    overrides: list[str]
    machine: Machine
    load: Load
    turns: list[Turn]
    prefixes: list[Prefix]

    def to_json(self) -> str:
        shares = {prefix.where: prefix.share for prefix in self.prefixes}
        return json.dumps(asdict(self) | {"shares": shares}, indent=2)

    def to_markdown(self) -> str:
        turns = [
            ("turn", "prompt", "computed", "new", "first token", "without the cache"),
            ("---:",) * 6,
            *(
                (
                    str(i),
                    *(str(n) for n in (turn.num_prompt, turn.num_computed, turn.num_new)),
                    f"{turn.first_token_s * 1e3:.1f} ms",
                    f"{turn.uncached_s * 1e3:.1f} ms",
                )
                for i, turn in enumerate(self.turns, 1)
            ),
        ]
        prefixes = [
            (
                f"{self.load.num_cached:,} tokens cached",
                "found",
                "first token",
                "without the cache",
                "share",
                "bar",
            ),
            ("---", *("---:",) * 5),
            *(
                (
                    f"on the {prefix.where}",
                    f"{prefix.num_found:,}",
                    f"{prefix.first_token_s * 1e3:.1f} ms",
                    f"{prefix.uncached_s * 1e3:.1f} ms",
                    f"{prefix.share:.3f}",
                    f"{BARS[prefix.where]}",
                )
                for prefix in self.prefixes
            ),
        ]
        load, machine = self.load, self.machine
        asked = [
            f"--turns {load.num_turns}",
            f"--cached {load.num_cached}",
            f"--runs {load.runs}",
            *(f"--set {override}" for override in self.overrides),
        ]
        lines = [
            f"{self.model}; {load.num_new} tokens new, {load.num_answered} answered; medians of "
            f"{load.runs} prefixes.",
            f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:.0f} GiB, load before "
            f"{machine.load_before:.1f}; commit {machine.commit}"
            f"{' with changes' if machine.dirty else ''}; "
            f"`{' '.join(['weft bench cache', *self.arguments, *asked])}`.",
        ]
        parts = [_table(turns), _table(prefixes), "\n".join(f"- {line}" for line in lines)]
        return "\n\n".join(parts)


def run(
    model: Path | None = None,
    overrides: Sequence[str] = (),
    load: Load = Load(),
    *,
    cache: Path = Path(".cache"),
    tell: Tell = lambda line: None,
) -> Report:
    """Raises RequestError where a request does not fit, ValueError where there is no model, and
    what building the engine raises."""
    machine = this_machine(ROOT)
    directory = model or random_model(RANDOM_MODEL | {"context": CONTEXT}, cache, tell)
    # What is to stay, stays; and what is to go down makes room for the next.
    large, small = (
        override_config(_config(directory, load.longest * times), overrides) for times in (4, 1.5)
    )
    ensure_devices(large.mesh)
    keep_compiled_programs()
    with _client(large, load) as client:
        tell(f"a conversation of {load.num_turns} turns")
        turns = _converse(client, load)
        tell(f"{load.runs} prefixes of {load.num_cached:,} tokens on the device")
        prefixes = [_on_device(client, load)]
    with TemporaryDirectory(dir=cache, prefix="tier-") as folder:
        for where, tiers in _tiers(Path(folder)).items():
            tell(f"{load.runs} prefixes of {load.num_cached:,} tokens on the {where}")
            with _client(override_config(small, tiers), load) as client:
                prefixes.append(_below(client, load, where))
    return Report(
        model=describe(directory),
        arguments=[] if model is None else [str(model)],
        overrides=list(overrides),
        machine=machine,
        load=load,
        turns=turns,
        prefixes=prefixes,
    )


@dataclass(frozen=True)
class _Answer:
    first_token_s: float
    token_ids: list[int]
    num_cached: int


class _Client:
    """Asks for one answer at a time."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._rng = random.Random(0)
        self._num_asked = 0

    def tokens(self, count: int) -> list[int]:
        return self._rng.choices(range(self._engine.info.vocab_size), k=count)

    def ask(self, prompt: Sequence[int], num_tokens: int, cache_salt: str = "") -> _Answer:
        """Raises RequestError where the request ends otherwise than by its length."""
        self._num_asked += 1
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        request = GenerateRequest(
            str(self._num_asked), tuple(prompt), sampling, cache_salt=cache_salt
        )
        arrivals: list[tuple[float, Output]] = []
        ended = threading.Event()

        def take(output: Output) -> None:
            arrivals.append((time.perf_counter(), output))
            if output.finish_reason is not None:
                ended.set()

        sent_s = time.perf_counter()
        self._engine.submit(request, take)
        ended.wait()
        last = arrivals[-1][1]
        if last.finish_reason is not FinishReason.LENGTH or last.usage is None:
            raise RequestError(f"a request ended by {last.finish_reason}: {last.error}")
        return _Answer(
            arrivals[0][0] - sent_s,
            [token for _, output in arrivals for token in output.token_ids],
            last.usage.cached_tokens,
        )

    def settle(self) -> None:
        """Waits until no page is on its way down."""
        seen: object = None
        while True:
            before, seen = seen, [(t.num_pages, t.num_queued) for t in self._engine.tiers()]
            if seen == before:
                return
            time.sleep(SETTLED_S)

    def ask_uncached(self, prompt: Sequence[int]) -> float:
        """Seconds to a first token where nothing of the prompt is cached."""
        return self.ask(prompt, 1, cache_salt=f"alone {self._num_asked}").first_token_s


def _converse(client: _Client, load: Load) -> list[Turn]:
    turns: list[Turn] = []
    conversation: list[int] = []
    for _ in range(load.num_turns):
        num_known = max(len(conversation) - 1, 0)
        conversation += client.tokens(load.num_new)
        answer = client.ask(conversation, load.num_answered)
        turns.append(
            Turn(
                num_prompt=len(conversation),
                num_computed=len(conversation) - answer.num_cached,
                num_new=len(conversation) - num_known,
                first_token_s=answer.first_token_s,
                uncached_s=client.ask_uncached(conversation),
            )
        )
        conversation += answer.token_ids
    return turns


def _on_device(client: _Client, load: Load) -> Prefix:
    first, uncached = [], []
    for _ in range(load.runs):
        prefix = client.tokens(load.num_cached)
        uncached.append(client.ask(prefix + client.tokens(load.num_new), 1))
        first.append(client.ask(prefix + client.tokens(load.num_new), 1))
    return _medians("device", first, uncached)


def _below(client: _Client, load: Load, where: str) -> Prefix:
    """Each prefix is asked for again after the next has taken its place on the device."""
    first, uncached = [], []
    previous = client.tokens(load.num_cached)
    client.ask(previous, 1)
    for i in range(load.runs + 1):
        prefix = client.tokens(load.num_cached)
        alone = client.ask(prefix + client.tokens(load.num_new), 1)
        client.settle()
        again = client.ask(previous + client.tokens(load.num_new), 1)
        client.settle()
        previous = prefix
        # In the first round it is learned how fast the tiers are.
        if i:
            uncached.append(alone)
            first.append(again)
    return _medians(where, first, uncached)


def _medians(where: str, first: Sequence[_Answer], uncached: Sequence[_Answer]) -> Prefix:
    return Prefix(
        where,
        median(answer.first_token_s for answer in first),
        median(answer.first_token_s for answer in uncached),
        round(median(answer.num_cached for answer in first)),
    )


def _config(directory: Path, num_tokens: float) -> ServeConfig:
    """With a pool of so many tokens."""
    num_pages = math.ceil(num_tokens / PAGE_SIZE)
    asked = {
        "model": {"path": str(directory.absolute())},
        "schedule": {"max_batch": 4},
        "cache": {"pages": num_pages, "page_size": PAGE_SIZE},
    }
    return make_config(asked, "weft bench cache")


def _tiers(folder: Path) -> dict[str, list[str]]:
    """By where prefixes are to lie, what to set."""
    url = folder.absolute().as_uri()
    disk = f'tiers.stores=[{{name="disk", url="{url}", gib={HOST_GIB}}}]'
    return {
        "host": [f"tiers.host_gib={HOST_GIB}"],
        "disk": [f"tiers.host_gib={LITTLE_GIB}", disk],
    }


@contextmanager
def _client(config: ServeConfig, load: Load) -> Iterator[_Client]:
    """Of an engine that has served a little."""
    engine = build_engine(config, Progress, check=partial(_check, load))
    engine.start()
    try:
        client = _Client(engine)
        client.ask(client.tokens(load.num_new), load.num_answered)
        yield client
    finally:
        engine.stop()


def _check(load: Load, info: ModelInfo) -> None:
    """Refuses what the engine would, before weights are read and steps compiled."""
    if load.longest > info.max_context:
        raise RequestError(
            f"a request has up to {load.longest:,} tokens with its answer, and {info.name} has a "
            f"context of {info.max_context:,}; lower --cached or --turns, or name another model"
        )
    held = info.num_pages * info.page_size
    if load.longest > held:
        raise RequestError(
            f"a request of {load.longest:,} tokens doesn't fit the cache, which holds {held:,}; "
            "raise cache.pages, or lower --cached"
        )


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
