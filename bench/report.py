"""What a bench found, as JSON and as a Markdown table.

It does not know how anything was measured (`bench/offline.py`).
"""

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from plan.machine import cpu_model, git


@dataclass(frozen=True)
class Machine:
    """Where and from which sources a bench ran."""

    cpu: str
    num_cores: int
    memory_gib: float
    system: str
    python: str
    load_before: float
    """Mean number of runnable processes in the minute before; near 0 on a quiet machine."""
    commit: str
    """Short hash, or why there is none."""
    dirty: bool
    """Whether the sources differed from that commit."""


@dataclass(frozen=True)
class Workload:
    name: str
    description: str
    """What counts as a token and what as time."""


@dataclass(frozen=True)
class Side:
    """One engine and its figures."""

    name: str
    versions: dict[str, str]
    settings: str
    start_s: float
    """Load and compile; not part of any figure, nor is the next."""
    warmup_s: float
    other_cores: float
    """Cores that everything else kept busy while it was timed, idle peers included."""
    samples: dict[str, list[float]]
    """For each workload, tokens/s of each run."""


@dataclass(frozen=True)
class Difference:
    """Where two engines first chose differently for one prompt."""

    workload: str
    run: int
    prompt: int
    position: int
    our_id: int
    peer_id: int
    our_margin: float
    """By how much our best logit was above our second."""
    peer_margin: float


@dataclass(frozen=True)
class Agreement:
    """How many of the prompts two engines continued with the same tokens, all of them."""

    num_prompts: int
    num_equal: int
    differences: list[Difference]
    """The first of each workload that has one."""


@dataclass(frozen=True)
class Report:
    """Weft is the first of `sides`; a peer is in `sides` and `agreements`, or in `not_measured`."""

    command: str
    model: str
    machine: Machine
    workloads: list[Workload]
    sides: list[Side]
    agreements: dict[str, Agreement]
    bars: dict[str, dict[str, float]]
    """For each peer, the ratio promised for a workload, where one is."""
    not_measured: dict[str, str]
    """Why, for each peer that isn't."""

    def to_json(self) -> str:
        """All of it, with medians and ratios spelt out."""
        ours, *peers = self.sides
        names = [workload.name for workload in self.workloads]
        figures = {
            name: {
                "median": {side.name: statistics.median(side.samples[name]) for side in self.sides},
                "ratio": {peer.name: ratio(ours, peer, name)[0] for peer in peers},
            }
            for name in names
        }
        return json.dumps(asdict(self) | {"figures": figures}, indent=2)

    def to_markdown(self) -> str:
        return f"{self._table()}\n\n{self._circumstances()}\n"

    def _table(self) -> str:
        ours, *peers = self.sides
        header = ["tokens/s", *(side.name for side in self.sides)]
        header += [*self.not_measured]
        for peer in peers:
            header += [f"{ours.name} / {peer.name}", *(["bar"] if self._has_bars(peer) else [])]
        rows = [
            [
                f"{workload.name} ({workload.description})",
                *(_rate(side.samples[workload.name]) for side in self.sides),
                *("not measured" for _ in self.not_measured),
                *(cell for peer in peers for cell in self._compared(peer, workload.name)),
            ]
            for workload in self.workloads
        ]
        rule = ["---", *("---:" for _ in header[1:])]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))

    def _compared(self, peer: Side, workload: str) -> list[str]:
        cells = [_ratio(*ratio(self.sides[0], peer, workload))]
        if self._has_bars(peer):
            bar = self.bars[peer.name].get(workload)
            cells.append("none" if bar is None else f"{bar:.2f}")
        return cells

    def _has_bars(self, peer: Side) -> bool:
        return bool(self.bars.get(peer.name))

    def _circumstances(self) -> str:
        machine = self.machine
        num_runs = len(next(iter(self.sides[0].samples.values())))
        lines = [
            f"Median of {num_runs} (lowest to highest); {self.model}.",
            f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:.0f} GiB, "
            f"{machine.system}, Python {machine.python}, load before {machine.load_before:.1f}; "
            f"commit {machine.commit}{' with changes' if machine.dirty else ''}; "
            f"`{self.command}`.",
            *(_side(side) for side in self.sides),
            *(
                f"{name}: not measured: {' '.join(why.split())}"
                for name, why in self.not_measured.items()
            ),
            *(line for name, found in self.agreements.items() for line in _agreement(name, found)),
        ]
        return "\n".join(f"- {line}" for line in lines)


def ratio(ours: Side, peer: Side, workload: str) -> tuple[float, float, float]:
    """Our median over the peer's, and the lowest and highest of the runs' own ratios.

    Run i of both sides was timed back to back, so those ratios hold where the machine drifts.
    """
    our_rates, peer_rates = ours.samples[workload], peer.samples[workload]
    each = [a / b for a, b in zip(our_rates, peer_rates, strict=True)]
    return statistics.median(our_rates) / statistics.median(peer_rates), min(each), max(each)


def this_machine(sources: Path) -> Machine:
    """The machine we are on, and the commit that `sources`, a checkout, is at."""
    commit = git(sources, "rev-parse", "--short", "HEAD")
    return Machine(
        cpu=cpu_model(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=psutil.virtual_memory().total / 2**30,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        load_before=os.getloadavg()[0],
        commit=commit or "unknown (no commit here)",
        dirty=bool(git(sources, "status", "--porcelain")),
    )


def _side(side: Side) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in side.versions.items())
    return (
        f"{side.name}: {versions}; {side.settings}; not counted: {side.start_s:.1f} s to load "
        f"and compile, {side.warmup_s:.1f} s for a first round; while it was "
        f"timed, everything else kept {side.other_cores:.2f} cores busy."
    )


def _agreement(peer: str, found: Agreement) -> list[str]:
    lines = [
        f"{found.num_equal} of {found.num_prompts} prompts were continued with the same tokens "
        f"as by {peer}{'.' if found.num_equal == found.num_prompts else ', where they differ:'}"
    ]
    return lines + [
        f"{d.workload}, run {d.run}, prompt {d.prompt}, from token {d.position} on: {d.our_id} "
        f"here, {d.peer_id} there; the two best logits are {d.our_margin:.2g} apart here, "
        f"{d.peer_margin:.2g} there."
        for d in found.differences
    ]


def _rate(samples: Sequence[float]) -> str:
    return _spread(statistics.median(samples), min(samples), max(samples), _three_digits)


def _ratio(median: float, low: float, high: float) -> str:
    return _spread(median, low, high, lambda value: f"{value:.2f}")


def _spread(median: float, low: float, high: float, show: Callable[[float], str]) -> str:
    return f"{show(median)} ({show(low)} to {show(high)})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
