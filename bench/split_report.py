"""What `bench/split.py` found, as JSON and as Markdown.

It does not know how anything was measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.report import Machine
from bench.split_load import LIMIT, Alone, Figures, Load, medians, ratios
from bench.split_moving import Moving
from bench.split_soak import Soaked

ONE = "one engine, one device"
"""What the others are compared with."""


@dataclass(frozen=True)
class Difference:
    """Where an arm first chose another token than the first arm."""

    arm: str
    request: str
    position: int
    margin: float
    """By how much the first arm's best logit was above its second."""


@dataclass(frozen=True)
class Mixed:
    """Long prompts among streams."""

    load: Load
    alone: Alone
    rounds: dict[str, list[Figures]]
    """By arm."""
    num_compared: int
    """Answers, whole or begun, of which the first arm has as much."""
    differences: list[Difference]
    outcomes: dict[str, dict[str, int]]
    """Of transfers, by arm that has some."""
    compiled_late: int


@dataclass(frozen=True)
class Report:
    model: str
    command: str
    machine: Machine
    mixed: Mixed | None
    moving: list[Moving]
    page_bytes: int
    """On the wire; 0 where nothing went over one."""
    soaked: list[Soaked]

    @property
    def is_clean(self) -> bool:
        late = self.mixed is not None and self.mixed.compiled_late
        return not late and all(one.is_clean for one in self.soaked)

    def to_json(self) -> str:
        figures: dict[str, Any] = {"is_clean": self.is_clean}
        if self.mixed:
            rounds = self.mixed.rounds
            figures["medians"] = {arm: asdict(medians(own)) for arm, own in rounds.items()}
            figures["ratios"] = {
                arm: asdict(ratios(own, rounds[ONE])) for arm, own in rounds.items()
            }
        return json.dumps(asdict(self) | {"figures": figures}, indent=2)

    def to_markdown(self) -> str:
        parts: list[str] = []
        if self.mixed:
            parts += [_mixed_table(self.mixed), _moving_table(self.moving)]
        if self.soaked:
            parts.append(_soaked_table(self.soaked))
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self._lines())])

    def _lines(self) -> list[str]:
        machine = self.machine
        lines = [*_mixed_lines(self.mixed)] if self.mixed else []
        if self.page_bytes:
            lines.append(f"A page has {self.page_bytes:,} bytes on the wire.")
        if self.soaked:
            lines.append(
                "Soak: a random model of 2 layers; "
                + "; ".join(f"{one.way}: {_counts(one.outcomes)}" for one in self.soaked)
                + "."
            )
        return [
            *lines,
            f"{self.model}.",
            f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:.0f} GiB, load before "
            f"{machine.load_before:.1f}; commit {machine.commit}"
            f"{' with changes' if machine.dirty else ''}; `{self.command}`.",
        ]


def _mixed_table(mixed: Mixed) -> str:
    rows = [
        (
            "median of rounds (of the first row's)",
            "between tokens, p50 beside prompts",
            "p99 beside prompts",
            "p99 at all times",
            "first token of a long prompt, p50",
            "p99",
            "of a short one, p50",
            "p99",
            "tokens/s",
            "well served",
        ),
        ("---", *("---:",) * 9),
    ]
    for arm, rounds in mixed.rounds.items():
        own, ratio = medians(rounds), ratios(rounds, mixed.rounds[ONE])
        times = ("gap_p50", "gap_p99", "all_p99", "long_p50", "long_p99", "short_p50", "short_p99")
        cells = [f"{_ms(getattr(own, t))} ({getattr(ratio, t):.2f})" for t in times]
        rate = f"{own.tokens_per_s:,.0f} ({ratio.tokens_per_s:.2f})"
        rows.append((arm, *cells, rate, f"{own.goodput:.0%}"))
    return _table(rows)


def _mixed_lines(mixed: Mixed) -> list[str]:
    load, alone = mixed.load, mixed.alone
    num_rounds = len(mixed.rounds[ONE])
    num_equal = mixed.num_compared - len(mixed.differences)
    lines = [
        f"Rounds: {num_rounds}, each of {load.num_prompts} prompts of {load.num_prompt:,} tokens, "
        f"{load.spacing * alone.long_first:.2f} s apart in the mean (Poisson; {load.spacing:g} "
        f"times what one takes alone), beside {load.num_streams} streams ({load.num_asked} tokens "
        f"in, {load.num_answered} out, then the next).",
        f"Alone, {ONE}: first token of a long prompt {_ms(alone.long_first)}, of a short one "
        f"{_ms(alone.short_first)}, {_ms(alone.gap)} between a stream's tokens. Well served is a "
        f"request whose first token, and 99% of whose gaps, take at most {LIMIT:g} times as long.",
        f"{num_equal} of {mixed.num_compared} answers have the tokens of {ONE}"
        f"{'.' if not mixed.differences else ', as far as both went; the others part where:'}",
        *(
            f"{d.arm}, {d.request}, token {d.position}: the two best logits are {d.margin:.2g} "
            "apart."
            for d in mixed.differences
        ),
        *(f"{arm}: transfers: {_counts(own)}." for arm, own in mixed.outcomes.items()),
    ]
    if mixed.compiled_late:
        lines.append(f"{mixed.compiled_late} programs were compiled while it was timed: a fault.")
    return lines


def _moving_table(moving: Sequence[Moving]) -> str:
    rows = [
        (
            "pages of a prompt, medians",
            "pages",
            "moved alone",
            "pages/s",
            "first token, one engine",
            "split",
            "later by",
            "hidden",
        ),
        ("---", *("---:",) * 7),
        *(
            (
                one.way,
                str(one.num_pages),
                _ms(one.moving_s),
                f"{one.pages_per_s:,.0f}",
                _ms(one.one_engine_s),
                _ms(one.split_s),
                _ms(one.later_s),
                f"{one.hidden:.0%}",
            )
            for one in moving
        ),
    ]
    return _table(rows)


def _soaked_table(soaked: Sequence[Soaked]) -> str:
    rows = [
        (
            "requests",
            "one engine's tokens",
            "cancelled",
            "other tokens",
            "lost",
            "kills",
            "preemptions",
            "pages left (decode, prefill)",
            "compiled late",
            "seconds",
        ),
        ("---", *("---:",) * 9),
        *(
            (
                one.way,
                str(one.num_answered),
                str(one.num_cancelled),
                str(len(one.wrong)),
                str(len(one.lost)),
                str(one.num_kills),
                str(one.num_preemptions),
                ", ".join(str(num) for num in one.pages_left.values()),
                str(sum(one.compiled_late.values())),
                f"{one.seconds:.0f}",
            )
            for one in soaked
        ),
    ]
    return _table(rows)


def _counts(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{num} {name}" for name, num in sorted(outcomes.items())) or "none"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
