"""How far long work is: a bar on a terminal, elsewhere a plain line every few seconds, on stderr.

It does not know what the work is.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, Self, TextIO

LINE_INTERVAL_S = 5.0
"""Between plain lines: often enough to see that work goes on, rare enough for a log."""


class Reporter(Protocol):
    """Makes a Progress; the class itself is one, and `Silent` is another."""

    def __call__(self, title: str, total: int | None = None, unit: str = "B") -> "Progress": ...


class Progress:
    """A piece of work of `total` units, to be used as a context; None: the total is told later.

    The unit "B" is shown in kB, MB, GB; others, such as "programs", as they are.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "B",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.total, self.unit = title, total, unit
        self.done = self.kept = 0
        self.stream = stream or sys.stderr
        self._clock = clock
        self._started = self._told = clock()
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        self._started = self._told = self._clock()
        if self.stream.isatty():
            self._bar = _Bar(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            kept = f"{self.kept:,} of them from an earlier start" if self.kept else ""
            took = f"{_amount(self.done, self.unit)} in {self._elapsed_s:.1f} s"
            self._say(", ".join(filter(None, [took, self._rate, kept])))

    def update(self, done: int, total: int | None = None, detail: str = "", kept: int = 0) -> None:
        """`done` units in all so far; `detail` names the one at hand.

        `kept` of them were there already, and say nothing of how long the others take.
        """
        self.done, self.total = done, self.total if total is None else total
        self.kept = kept
        if self._bar is not None:
            self._bar.update(", ".join(filter(None, [self.pace, detail])))
        elif (now := self._clock()) - self._told >= LINE_INTERVAL_S:
            self._told = now
            self._say(", ".join(filter(None, [self._share(), self.pace, detail])))

    def advance(self, detail: str = "") -> None:
        """One unit more."""
        self.update(self.done + 1, detail=detail)

    @property
    def pace(self) -> str:
        """The rate, of bytes, and how long is left, as far as they are known."""
        made = self.done - self.kept
        if not self.total or made <= 0 or self.done >= self.total:
            return self._rate
        left_s = self._elapsed_s * (self.total - self.done) / made
        left = f"{left_s:.0f} s" if left_s < 100 else f"{left_s / 60:.0f} min"
        return ", ".join(filter(None, [self._rate, f"{left} left"]))

    @property
    def _rate(self) -> str:
        if self.unit != "B" or self._elapsed_s <= 0:
            return ""
        return f"{_amount(int(self.done / self._elapsed_s), self.unit)}/s"

    @property
    def _elapsed_s(self) -> float:
        return self._clock() - self._started

    def _share(self) -> str:
        if not self.total:
            return _amount(self.done, self.unit)
        return f"{100 * self.done // self.total}% of {_amount(self.total, self.unit)}"

    def _say(self, text: str) -> None:
        print(f"{self.title}: {text}", file=self.stream, flush=True)


class Silent(Progress):
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, total: int | None = None, detail: str = "", kept: int = 0) -> None:
        self.done, self.kept = done, kept


class _Bar:
    """rich's; imported here, since only a terminal needs it."""

    def __init__(self, progress: Progress):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
        )
        from rich.progress import Progress as RichProgress

        self._progress = progress
        is_bytes = progress.unit == "B"
        self._rich: Any = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn() if is_bytes else MofNCompleteColumn(),
            TextColumn("" if is_bytes else progress.unit),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=Console(file=progress.stream),
            transient=True,
        )
        self._task = self._rich.add_task(progress.title, total=progress.total, detail="")
        self._rich.start()

    def update(self, detail: str) -> None:
        progress = self._progress
        self._rich.update(self._task, completed=progress.done, total=progress.total, detail=detail)

    def close(self) -> None:
        self._rich.stop()


def _amount(number: int, unit: str) -> str:
    if unit != "B":
        return f"{number:,} {unit}"
    for size, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number} B"
