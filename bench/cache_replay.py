"""How much of a trace's prompts the prefix cache finds, by what it may hold and what it keeps.

    python -m bench.cache_replay [--json] [--trace FILE] [--operations]

A page stands for a block of 512 tokens of the trace. Nothing is computed, and no time passes but
that of the trace: it does not know how long anything takes, except with `--operations`
(`bench/cache_operations.py`).
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cache_operations import PAGE_SIZES, Operations, time_lookup, time_operations
from bench.cache_traces import BLOCK, TRACE, Request, read_trace, tenants, with_answers
from bench.report import Machine, this_machine
from cache.eviction import AGE_POWER, COSTS_PER_DOUBLING, NUM_USES, EvictionOrder
from cache.keys import PageNames, root_key
from cache.pages import OutOfPages, PagePool
from cache.prefix_index import ROOT
from cache.tables import PageTables
from plan.machine import ROOT as SOURCES

ALIKE = 26_624
"""Tokens of context at which a token's attention takes as many multiplications as the weights of
its layer: those of Llama 3.1 8B."""
NUM_OPEN = 300
"""Requests that hold their pages at once in two of the rows: 50 or 200 change nothing, since what
goes is older than all of them."""
BUDGETS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Of the pages that all blocks of the trace would take."""


@dataclass(frozen=True)
class Found:
    """Of what was asked for, what was found."""

    tokens: float
    cost: float
    """Of the work of computing it."""


@dataclass(frozen=True)
class Policy:
    """What a page is worth: its cost, how likely pages used as often are asked for, its age."""

    name: str
    by_cost: bool = True
    by_uses: bool = True
    age_power: float = AGE_POWER
    leaves_first: bool = True


OURS = Policy("as served")
OLDEST = Policy("the oldest leaf goes", by_cost=False, by_uses=False)
POLICIES = (
    OURS,
    OLDEST,
    Policy("the oldest goes, leaf or not", by_cost=False, by_uses=False, leaves_first=False),
    Policy("as served, without cost", by_cost=False),
    Policy("as served, without uses", by_uses=False),
    Policy("as served, by age to the 2nd power", age_power=2),
    Policy("as served, by age to the 1st power", age_power=1),
)


class _Variant(EvictionOrder):
    """The order of a policy that is not served."""

    def __init__(self, policy: Policy, num_pages: int) -> None:
        super().__init__(num_pages, 1, cost if policy.by_cost else lambda _: 1.0)
        self._policy = policy

    def _worth(self, kind: int, stamp: int) -> float:
        uses = kind % NUM_USES
        likely = self._used[uses] / (self._used[uses] + self._lost[uses])
        age = self._now - stamp // self._num_pages + 1
        worth = 2 ** (kind // NUM_USES / COSTS_PER_DOUBLING) / age**self._policy.age_power
        return worth * likely if self._policy.by_uses else worth


def cost(block: int) -> float:
    """Of computing a token of the prompt's block number `block`."""
    return 1 + block * BLOCK / ALIKE


class _Tally:
    """Adds up what is found of requests."""

    def __init__(self) -> None:
        self._asked, self._found = [0.0, 0.0], [0.0, 0.0]

    def add(self, request: Request, num_found: int) -> None:
        num_asked = min(len(request.blocks), -(-request.num_tokens // BLOCK))
        for total, num_blocks in ((self._asked, num_asked), (self._found, num_found)):
            total[0] += min(num_blocks * BLOCK, request.num_tokens)
            total[1] += sum(map(cost, range(min(num_blocks, num_asked))))

    @property
    def found(self) -> Found:
        (asked, asked_cost), (found, found_cost) = self._asked, self._found
        return Found(found / asked, found_cost / asked_cost)


def oracle(requests: Sequence[Request]) -> Found:
    """What is found by one who forgets nothing: in a set of all blocks that came before."""
    seen, tally = set[int](), _Tally()
    for request in requests:
        unseen = (i for i, block in enumerate(request.blocks) if block not in seen)
        tally.add(request, next(unseen, len(request.blocks)))
        seen.update(request.blocks)
    return tally.found


def replay(
    requests: Sequence[Request], num_pages: int, policy: Policy = OURS, num_open: int = 0
) -> Found:
    """What is found where `num_pages` are kept, and each request holds its pages until `num_open`
    others have come, or fewer, where there is no room for as many.

    Raises OutOfPages where a prompt has more blocks than are kept.
    """
    longest = max(len(request.blocks) for request in requests)
    if longest > num_pages:
        raise OutOfPages(
            f"a prompt has {longest} blocks, and {num_pages} are kept: the trace is too small for "
            "that budget"
        )
    if not policy.leaves_first:
        return _replay_oldest(requests, num_pages)
    pool = PagePool(num_pages + 1, 1, cost)
    if policy != OURS:
        pool.index._order = _Variant(policy, num_pages + 1)
    tables = PageTables(pool, num_open + 1, longest)
    free, held, tally = list(range(num_open + 1)), deque[int](), _Tally()
    for request in requests:
        names = PageNames(root_key(), 1)
        names.extend(request.blocks)
        num_found = pool.index.find(names.keys, 0, len(names))
        tally.add(request, num_found)
        if not free:
            free.append(_close(tables, held))
        row = free.pop()
        tables.adopt(row, pool.index.pages(names.keys[:num_found]))
        while tables.missing(row, len(names)) > pool.num_free:
            free.append(_close(tables, held))
        tables.grow(row, len(names))
        pages = tables.pages(row)
        for i in range(num_found, len(names)):
            pool.index.add(names, i, pages[i], pages[i - 1] if i else ROOT)
        pool.index.written()
        held.append(row)
        if not num_open:
            free.append(_close(tables, held))
    return tally.found


def _close(tables: PageTables, held: deque[int]) -> int:
    """The request that came first ends; returns its row."""
    row = held.popleft()
    tables.free(row)
    return row


def _replay_oldest(requests: Sequence[Request], num_pages: int) -> Found:
    """Where whatever was used longest ago goes, be it a prefix of what stays."""
    used, tally = dict[int, None](), _Tally()
    for request in requests:
        missing = (i for i, block in enumerate(request.blocks) if block not in used)
        tally.add(request, next(missing, len(request.blocks)))
        for block in request.blocks:
            used.pop(block, None)
            used[block] = None
        while len(used) > num_pages:
            del used[next(iter(used))]
    return tally.found


@dataclass(frozen=True)
class Row:
    policy: str
    num_open: int
    found: dict[str, Found]
    """By budget."""


@dataclass(frozen=True)
class Replay:
    """A workload's figures."""

    name: str
    num_requests: int
    num_asked: int
    """Blocks."""
    num_different: int
    oracle: Found
    rows: list[Row]

    def to_markdown(self) -> str:
        header = ["what is found (of the work)", *(f"{budget:.0%}" for budget in BUDGETS)]
        lines = [
            f"{self.name}: {self.num_requests:,} requests of {self.num_asked:,} blocks, "
            f"{self.num_different:,} of them different; one who forgets nothing finds "
            f"{_cell(self.oracle)}.",
            "",
            f"| {' | '.join(header)} |",
            f"| --- |{' ---: |' * len(BUDGETS)}",
        ]
        for row in self.rows:
            name = row.policy + (f", {row.num_open} open at once" if row.num_open else "")
            lines.append(f"| {name} | {' | '.join(map(_cell, row.found.values()))} |")
        return "\n".join(lines)


def _cell(found: Found) -> str:
    return f"{found.tokens:.2%} ({found.cost:.2%})"


def run(name: str, requests: Sequence[Request], tell: Callable[[str], None]) -> Replay:
    num_different = len({block for request in requests for block in request.blocks})
    rows = list[Row]()
    for policy, num_open in (
        *((policy, 0) for policy in POLICIES),
        (OURS, NUM_OPEN),
        (OLDEST, NUM_OPEN),
    ):
        tell(f"{name}: {policy.name}, {num_open} open")
        found = {
            f"{share:.0%}": replay(requests, int(share * num_different), policy, num_open)
            for share in BUDGETS
        }
        rows.append(Row(policy.name, num_open, found))
    num_asked = sum(len(request.blocks) for request in requests)
    return Replay(name, len(requests), num_asked, num_different, oracle(requests), rows)


@dataclass(frozen=True)
class Report:
    command: str
    machine: Machine
    replays: list[Replay]
    operations: Operations | None
    lookup_ms: dict[int, float]
    """Of a prompt of 131,072 tokens, by page size."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_markdown(self) -> str:
        machine = self.machine
        parts = [replay.to_markdown() for replay in self.replays]
        if self.operations:
            parts.append(self.operations.to_markdown())
            lookups = (f"{ms:.1f} ms at pages of {size}" for size, ms in self.lookup_ms.items())
            parts.append(f"- Looking up 131,072 tokens: {', '.join(lookups)}.")
        parts.append(
            f"- {machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:.0f} GiB, Python "
            f"{machine.python}, load before {machine.load_before:.1f}; commit {machine.commit}"
            f"{' with changes' if machine.dirty else ''}; `{self.command}`."
        )
        return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Replay a trace through the prefix cache.")
    parser.add_argument("--trace", type=Path, default=TRACE, help="in Mooncake's form")
    parser.add_argument("--operations", action="store_true", help="time the index instead")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    args: Any = parser.parse_args(arguments)
    command = "python -m bench.cache_replay" + (" --operations" if args.operations else "")
    machine = this_machine(SOURCES)
    if args.operations:
        lookup_ms = {size: time_lookup(size) for size in PAGE_SIZES}
        report = Report(command, machine, [], time_operations(), lookup_ms)
    else:
        try:
            trace = read_trace(args.trace)
        except OSError as error:
            sys.exit(f"no trace at {args.trace} ({error.strerror}): name one with --trace")
        except ValueError as error:
            sys.exit(str(error))
        workloads = {
            args.trace.stem: trace,
            f"{args.trace.stem}, each with a block of its answer": with_answers(trace),
            "tenants, conversations and long prompts that come once": tenants(),
        }

        def tell(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        try:
            replays = [run(name, requests, tell) for name, requests in workloads.items()]
        except OutOfPages as error:
            sys.exit(str(error))
        report = Report(command, machine, replays, None, {})
    print(report.to_json() if args.json else report.to_markdown())


if __name__ == "__main__":
    main()
