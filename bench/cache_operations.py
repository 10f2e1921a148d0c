"""How many pages a second the prefix index finds, hands out, names and takes back, on one core.

    python -m bench.cache_replay --operations

It does not know which pages are worth keeping (`bench/cache_replay.py`).
"""

import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time

from cache.keys import PageNames, root_key
from cache.pages import PagePool
from cache.prefix_index import ROOT
from cache.tables import PageTables

VOCAB = 128_256
PROMPT = 131_072
PAGE_SIZES = (16, 64)


@dataclass(frozen=True)
class Mix:
    """Conversations of which some go on while others begin, in a pool that is always full."""

    page_size: int = 16
    num_pages: int = 20_000
    num_requests: int = 1_500
    num_first: int = 32
    """Pages of a conversation's first prompt."""
    num_added: tuple[int, ...] = (8, 16, 64)
    """Pages that a request adds: one of these."""
    num_open: int = 40
    """Half of the requests go on with one of so many conversations, the last ones."""
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        rng, prompts = random.Random(self.seed), list[list[int]]()
        for _ in range(self.num_requests):
            going_on = prompts and rng.random() < 0.5
            before = rng.choice(prompts[-self.num_open :]) if going_on else None
            num_new = rng.choice(self.num_added) + (0 if before else self.num_first)
            new = rng.choices(range(VOCAB), k=num_new * self.page_size)
            prompts.append([*(before or []), *new])
        return prompts


@dataclass(frozen=True)
class Operations:
    """What of a page each operation is, in nanoseconds of the processor's time."""

    find_ns: float
    """Its number is found by its name."""
    adopt_ns: float
    """It is used once more and has one more owner, in a row of a page table."""
    hand_out_ns: float
    """It is evicted, and goes to a row."""
    name_ns: float
    """It is given its name."""
    release_ns: float
    """It has one owner less."""
    num_pages: int
    """Of all of these."""
    per_second: float

    def to_markdown(self) -> str:
        cells = (self.find_ns, self.adopt_ns, self.hand_out_ns, self.name_ns, self.release_ns)
        return "\n".join(
            [
                "| ns a page | find | adopt | evict, hand out | name | release | pages/s |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
                f"| {self.num_pages:,} pages | {' | '.join(f'{cell:.0f}' for cell in cells)} "
                f"| {self.per_second:,.0f} |",
            ]
        )


def time_operations(mix: Mix = Mix(), runs: int = 7) -> Operations:
    """Of the run in the middle. Names are made before: hashing is part of a lookup."""
    sequences = list[PageNames]()
    for prompt in mix.prompts():
        names = PageNames(root_key(), mix.page_size)
        names.extend(prompt)
        sequences.append(names)
    timed = sorted((_run(mix, sequences) for _ in range(runs)), key=lambda found: found.per_second)
    return timed[runs // 2]


def _run(mix: Mix, sequences: Sequence[PageNames]) -> Operations:
    pool = PagePool(mix.num_pages + 1, mix.page_size, lambda position: 1 + position / 1000)
    index, tables = pool.index, PageTables(pool, 1, max(map(len, sequences)))
    pages, seconds = Counter[str](), defaultdict[str, float](float)

    @contextmanager
    def timed(name: str, num_pages: int) -> Iterator[None]:
        before = process_time()
        yield
        seconds[name] += process_time() - before
        pages[name] += num_pages

    for names in _filled(pool, tables, sequences, mix):
        keys, total = names.keys, len(names)
        num_found = index.find(keys, 0, total)
        with timed("find", num_found):
            found = index.pages(keys[: index.find(keys, 0, total)])
        with timed("adopt", num_found):
            tables.adopt(0, found)
        with timed("hand_out", total - num_found):
            tables.grow(0, total * mix.page_size)
        with timed("name", total - num_found):
            _name(pool, tables, names, num_found)
            index.written()
        with timed("release", total):
            tables.free(0)
    each = {f"{name}_ns": seconds[name] / pages[name] * 1e9 for name in seconds}
    return Operations(
        **each, num_pages=pages.total(), per_second=pages.total() / sum(seconds.values())
    )


def _filled(
    pool: PagePool, tables: PageTables, sequences: Sequence[PageNames], mix: Mix
) -> Iterator[PageNames]:
    """The sequences that come once the pool is full: until then nothing is evicted."""
    for names in sequences:
        if pool.num_usable - len(pool.index) >= len(names):
            num_found = pool.index.find(names.keys, 0, len(names))
            tables.adopt(0, pool.index.pages(names.keys[:num_found]))
            tables.grow(0, len(names) * mix.page_size)
            _name(pool, tables, names, num_found)
            tables.free(0)
        else:
            yield names


def _name(pool: PagePool, tables: PageTables, names: PageNames, first: int) -> None:
    pages = tables.pages(0)
    for number in range(first, len(names)):
        pool.index.add(names, number, pages[number], pages[number - 1] if number else ROOT)


def time_lookup(page_size: int, num_tokens: int = PROMPT, runs: int = 15) -> float:
    """Median milliseconds from a prompt's token ids to the pages that hold all of it."""
    prompt = random.Random(0).choices(range(VOCAB), k=num_tokens)
    names = PageNames(root_key(), page_size)
    names.extend(prompt)
    pool = PagePool(len(names) + 1, page_size)
    tables = PageTables(pool, 1, len(names))
    tables.grow(0, len(names) * page_size)
    _name(pool, tables, names, 0)
    took_ms = list[float]()
    for _ in range(runs):
        before = process_time()
        names = PageNames(root_key(), page_size)
        names.extend(prompt)
        pages = pool.index.pages(names.keys[: pool.index.find(names.keys, 0, len(names))])
        took_ms.append((process_time() - before) * 1e3)
        assert len(pages) == len(names), "the whole prompt is cached"
    return statistics.median(took_ms)
