"""A run as Markdown: which mesh wins where and why, then every point with its figures.

It does not know how figures were taken, and shows no figure that the records don't have.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from plan.contest import Verdict, decide, differing
from plan.drive import Run
from plan.experiment import Experiment
from plan.kinds import KINDS
from plan.ledger import Record
from plan.units import show, title


@dataclass(frozen=True)
class Report:
    experiment: Experiment
    run: Run
    command: str

    @property
    def kinds(self) -> dict[str, list[Record]]:
        """The records by kind."""
        by_kind = sorted(self.run.records, key=lambda record: list(KINDS).index(record.kind))
        return {kind: list(group) for kind, group in groupby(by_kind, key=lambda r: r.kind)}

    def verdicts(self, kind: str) -> list[Verdict]:
        contest = KINDS[kind].contest
        return [] if contest is None else decide(contest, self.kinds[kind])

    def to_markdown(self, pictures: Sequence[str] | None = ()) -> str:
        """`pictures` are files beside it; None: nothing could draw them."""
        parts = [f"# {self.experiment.title}", self._circumstances()]
        for kind, records in self.kinds.items():
            if verdicts := self.verdicts(kind):
                parts += [f"## Which {_competing(kind)} wins", _verdicts_table(kind, verdicts)]
                parts.append(_how_decided(kind, verdicts))
            parts += [
                f"![{name}]({name})" for name in pictures or () if name.startswith(f"{kind}-")
            ]
            parts += [f"## Every {kind}", _same(records)]
            for name, columns in KINDS[kind].tables.items():
                parts += [f"### {name}", _points_table(kind, records, columns)]
        if pictures is None:
            parts.append("There are no pictures: matplotlib is not installed.")
        bad = [record for record in self.run.records if record.status != "ok"]
        if bad:
            parts += ["## What did not run", "\n".join(map(_bad, bad))]
        if self.run.missing:
            missing = "\n".join(f"- {point.key}" for point in self.run.missing)
            parts += ["## Not measured yet", f"The same command goes on with these.\n\n{missing}"]
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All that it is made of, for JSON."""
        return {
            "experiment": self.experiment.name,
            "title": self.experiment.title,
            "command": self.command,
            "verdicts": {kind: list(map(asdict, self.verdicts(kind))) for kind in self.kinds},
            "records": [asdict(record) for record in self.run.records],
            "missing": [point.key for point in self.run.missing],
        }

    def summary(self) -> str:
        """A line for each case that was decided, and how many points came to what."""
        lines: list[str] = []
        for kind in self.kinds:
            for verdict in self.verdicts(kind):
                case = " ".join(f"{name}={value}" for name, value in verdict.where.items())
                lines.append(f"{case or kind}: {verdict.best}, {_margin(verdict)}")
        return "\n".join([*lines, self.counts()])

    def counts(self) -> str:
        statuses = [record.status for record in self.run.records]
        counted = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
        said = [f"{number} {status}" for status, number in counted.items()]
        if self.run.missing:
            said.append(f"{len(self.run.missing)} not measured yet")
        return f"{len(statuses) + len(self.run.missing)} points: {', '.join(said)}"

    def _circumstances(self) -> str:
        records = self.run.records
        dates = sorted({record.started[:10] for record in records})
        lines = [
            f"`{self.command}`",
            *dict.fromkeys(f"{record.device}; commit {record.commit}" for record in records),
            " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])) or "nothing was measured yet",
            self.counts(),
        ]
        hardware = self.experiment.hardware
        if hardware and any("floor_s" in record.figures for record in records):
            lines.append(f"floors are those of configs/hardware/{hardware}.toml")
        return "\n".join(f"- {line}" for line in lines)


def _competing(kind: str) -> str:
    contest = KINDS[kind].contest
    assert contest is not None
    return contest.setting


def _verdicts_table(kind: str, verdicts: Sequence[Verdict]) -> str:
    names = list(verdicts[0].where)
    header = [*names, f"best {_competing(kind)}", "by", "against the next", "why"]
    rows = [
        [
            *(_setting(kind, name, verdict.where[name]) for name in names),
            verdict.best,
            f"{show(verdict.figure, verdict.value)} {title(verdict.figure)}",
            _margin(verdict),
            _why(verdict),
        ]
        for verdict in verdicts
    ]
    return _table(header, rows, num_text=len(header))


def _margin(verdict: Verdict) -> str:
    if verdict.second is None or verdict.ratio is None:
        return "nothing else fits" if verdict.misfits else "nothing else was tried"
    margin = f"{verdict.ratio:.2f} x {verdict.second}"
    return margin if verdict.clear else f"{margin}, within the spread"


def _why(verdict: Verdict) -> str:
    reasons = [
        f"{title(r.figure)} {show(r.figure, r.best)} against {show(r.figure, r.second)}"
        for r in verdict.reasons
    ]
    if verdict.misfits:
        reasons.append(f"{', '.join(verdict.misfits)} did not fit")
    if verdict.second is not None and not verdict.reasons:
        reasons.insert(0, "it has less of nothing that was counted")
    return "; ".join(reasons) or ""


def _how_decided(kind: str, verdicts: Sequence[Verdict]) -> str:
    contest = KINDS[kind].contest
    assert contest is not None
    said = (
        "*Why* lists what the best has less of than the next, on one device and in one step; what "
        "it has more of is below."
    )
    if any(verdict.figure == contest.rate for verdict in verdicts):
        return f"{said} *Within the spread*: the quartiles of the two rates overlap."
    return (
        f"Nothing was run, so no rate was measured. The least {title(contest.unmeasured[0])} wins: "
        f"{contest.unmeasured_means}. {said}"
    )


def _same(records: Sequence[Record]) -> str:
    """The settings that all points share."""
    varying = differing(records)
    shared = {k: v for k, v in records[0].settings.items() if k not in varying and v != ""}
    return f"All with {', '.join(f'{name} {value}' for name, value in shared.items())}."


def _points_table(kind: str, records: Sequence[Record], figures: Sequence[str]) -> str:
    """A row for each point; a column that nobody has a figure for is left out."""
    contest = KINDS[kind].contest
    names = [name for name in differing(records) if contest is None or name not in contest.aside]
    shown = [name for name in figures if any(r.figures.get(name) is not None for r in records)]
    rows = [
        [
            *(_setting(kind, name, record.settings[name]) for name in names),
            *(show(name, record.figures.get(name)) for name in shown),
        ]
        for record in records
        if record.figures
    ]
    return _table([*names, *map(title, shown)], rows, num_text=len(names))


def _bad(record: Record) -> str:
    return f"- {record.key}: {record.status}: {' '.join(record.reason.split())}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text: int) -> str:
    rule = ["---"] * num_text + ["---:"] * (len(header) - num_text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _setting(kind: str, name: str, value: Any) -> str:
    contest = KINDS[kind].contest
    empty = contest.empty if contest and name == contest.setting else "none"
    return empty if value == "" else str(value)
