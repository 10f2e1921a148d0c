"""Which mesh, or whatever else competes, is best in which case, and what speaks for it.

It says nothing that is not in the records: no figure is worked out from another's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plan.kinds import Contest
from plan.ledger import Record

NOTABLE = 1.02
"""A reason's figures are as good as equal below this ratio."""


@dataclass(frozen=True)
class Reason:
    figure: str
    best: float
    second: float


@dataclass(frozen=True)
class Verdict:
    """One case: all settings but the competing one being equal."""

    where: Mapping[str, Any]
    """The settings that are not the same in all cases."""
    best: str
    second: str | None
    """None: nothing else fits, or was tried."""
    figure: str
    """What it was decided by: a rate, or where nothing ran a figure of which less is better."""
    value: float
    ratio: float | None
    """How many times better than the second's."""
    clear: bool
    """Whether the quartiles of the two rates are apart; figures that are counted have none."""
    reasons: Sequence[Reason]
    misfits: Sequence[str]


def decide(contest: Contest, records: Sequence[Record]) -> list[Verdict]:
    """A verdict for each case in which something fits, in the order of the records."""
    verdicts = (_verdict(contest, *case) for case in cases(contest, records))
    return [verdict for verdict in verdicts if verdict is not None]


def competitor(contest: Contest, record: Record) -> str:
    return str(record.settings[contest.setting]) or contest.empty


def cases(
    contest: Contest, records: Sequence[Record]
) -> list[tuple[Mapping[str, Any], list[Record]]]:
    """The settings of each case that are not the same in all, and its records."""
    aside = {contest.setting, *contest.aside}
    names = [name for name in differing(records) if name not in aside]
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.settings[name] for name in names), []).append(record)
    return [(dict(zip(names, case, strict=True)), some) for case, some in found.items()]


def differing(records: Sequence[Record]) -> list[str]:
    """The settings that are not the same in all of them."""
    if not records:
        return []
    names = records[0].settings
    return [name for name in names if len({record.settings[name] for record in records}) > 1]


def _verdict(
    contest: Contest, where: Mapping[str, Any], entrants: Sequence[Record]
) -> Verdict | None:
    fitting = [record for record in entrants if record.status == "ok"]
    misfits = [competitor(contest, r) for r in entrants if r.status == "does not fit"]
    if not fitting:
        return None
    ran = all(contest.rate in record.figures for record in fitting)
    if ran:
        figure, ranked = contest.rate, sorted(fitting, key=lambda r: -r.figures[contest.rate])
    else:
        figure = contest.unmeasured[0]
        if any(name not in record.figures for name in contest.unmeasured for record in fitting):
            return None
        ranked = sorted(fitting, key=lambda r: [r.figures[name] for name in contest.unmeasured])
    best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
    value = best.figures[figure]
    ratio, clear = None, True
    if second is not None:
        other = second.figures[figure]
        ratio = value / other if ran else other / value
        clear = not ran or best.figures[contest.rate_low] > second.figures[contest.rate_high]
    return Verdict(
        where=where,
        best=competitor(contest, best),
        second=second and competitor(contest, second),
        figure=figure,
        value=value,
        ratio=ratio,
        clear=clear,
        reasons=_reasons(contest, best, second) if second else [],
        misfits=misfits,
    )


def _reasons(contest: Contest, best: Record, second: Record) -> list[Reason]:
    """The figures in which the best has clearly less to do than the second."""
    found: list[Reason] = []
    for name in contest.reasons:
        mine, other = best.figures.get(name), second.figures.get(name)
        if mine is not None and other is not None and other > NOTABLE * mine:
            found.append(Reason(name, mine, other))
    return found
