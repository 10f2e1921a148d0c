"""Pictures of a run: a panel for each case with a bar for each competitor, and curves.

It needs matplotlib, and does not know how figures were taken.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plan.contest import cases, competitor
from plan.gpu_results import Curve
from plan.kinds import Contest
from plan.ledger import Record
from plan.units import show, title

COLORS = ("#1f6f8b", "#c4c9cf", "#d98e04")
LINE_COLORS = ("#1f6f8b", "#d98e04", "#7a4b94", "#5b8c2a", "#b03a48")
NUM_COLUMNS = 3

Panel = Callable[[Axes, Sequence[Record]], None]


def draw(contest: Contest, records: Sequence[Record], folder: Path, kind: str) -> list[str]:
    """Writes the kind's pictures into `folder`; their names, which begin with the kind's."""
    fitting = [record for record in records if record.status == "ok"]
    sized = [record for record in records if contest.memory[0] in record.figures]
    if not fitting:
        return []
    rate = contest.rate if contest.rate in fitting[0].figures else contest.unmeasured[0]
    rated = [record for record in fitting if rate in record.figures]
    pictures = {
        rate: (rated, rate, partial(_rates, contest, rate)),
        "memory": (sized, "bytes", partial(_memory, contest)),
    }
    names: list[str] = []
    for subject, (shown, unit, panel) in pictures.items():
        if shown:
            names.append(f"{kind}-{subject.replace('_', '-')}.png")
            _panels(contest, shown, folder / names[-1], unit, panel)
    return names


def draw_curves(curves: Sequence[Curve], device: str, path: Path) -> None:
    """Tokens per second by batch, each curve beside the most that the device allows."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for place, curve in enumerate(curves):
        color = LINE_COLORS[place % len(LINE_COLORS)]
        axes.plot(curve.batches, curve.floors_per_s, "--", color=color, linewidth=0.9)
        axes.plot(curve.batches, curve.tokens_per_s, "o-", color=color, label=curve.label)
    axes.plot([], [], "--", color="gray", label="the most at measured rates")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({batch for curve in curves for batch in curve.batches})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("rows decoded together")
    axes.set_ylabel("tokens/s")
    axes.set_title(device, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _panels(
    contest: Contest, records: Sequence[Record], path: Path, figure_name: str, panel: Panel
) -> None:
    shown = cases(contest, records)
    columns = min(NUM_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    most = max(len(some) for _, some in shown)
    size = (4.2 * columns, (0.8 + 0.24 * most) * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (where, some) in zip(grid.flat, shown, strict=False):
        panel(axes, some)
        axes.set_yticks(range(len(some)), [competitor(contest, record) for record in some])
        axes.invert_yaxis()
        axes.set_title(_case(where), fontsize=8)
        axes.xaxis.set_major_formatter(lambda value, _: show(figure_name, value))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(title(figure_name), fontsize=8)
    figure.savefig(path, dpi=120)


def _rates(contest: Contest, rate: str, axes: Axes, records: Sequence[Record]) -> None:
    """Bars with the quartiles as whiskers; a figure that was counted has none."""
    values = [record.figures[rate] for record in records]
    low, high = values, values
    if rate == contest.rate:
        low, high = (
            [record.figures[name] for record in records]
            for name in (contest.rate_low, contest.rate_high)
        )
    below = [value - least for value, least in zip(values, low, strict=True)]
    above = [most - value for value, most in zip(values, high, strict=True)]
    whiskers = [below, above] if rate == contest.rate else None
    axes.barh(range(len(values)), values, xerr=whiskers, color=COLORS[0], capsize=2, height=0.65)
    for place, (value, end) in enumerate(zip(values, high, strict=True)):
        axes.annotate(f"  {show(rate, value)}", (end, place), va="center", fontsize=7)
    axes.margins(x=0.2)


def _memory(contest: Contest, axes: Axes, records: Sequence[Record]) -> None:
    """What a device must hold, in parts; a line where it has no more, if that is in sight."""
    places = range(len(records))
    ends = [0.0] * len(records)
    for part, color in zip(contest.memory, COLORS, strict=True):
        values = [record.figures[part] for record in records]
        axes.barh(places, values, left=ends, color=color, height=0.65, label=title(part))
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    memory_bytes = min(record.figures["memory_bytes"] for record in records)
    if memory_bytes < 2 * max(ends):
        axes.axvline(memory_bytes, color="black", linewidth=0.8, linestyle="--")
    axes.legend(fontsize=6, frameon=False)


def _case(where: Mapping[str, Any]) -> str:
    """Names are given to numbers alone: `tiny, decode, batch 8`."""
    return ", ".join(
        value if isinstance(value, str) else f"{name} {value}" for name, value in where.items()
    )
