"""A run of an experiment: the points that its ledger lacks, one after the other.

It does not know what is measured or how a report looks, and imports no JAX: devices are seen by
workers alone (`plan/worker.py`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Protocol, Self

from plan.devices import Devices
from plan.experiment import Experiment, ExperimentError, Point
from plan.ledger import Ledger, Record, latest
from plan.worker import Answer, Worker, WorkerDied, WorkerLate
from serve.progress import Reporter, Silent


class Start(Protocol):
    """Starts a worker: the class itself does."""

    def __call__(self, devices: Devices, hardware: str | None, flags: str) -> Worker: ...


@dataclass(frozen=True)
class Run:
    """What is known of all of an experiment's points, in their order."""

    records: Sequence[Record]
    missing: Sequence[Point]
    """Not measured yet; a later run goes on with them."""


def run(
    experiment: Experiment,
    ledger: Ledger,
    commit: str,
    *,
    only: str = "",
    limit_s: float = float("inf"),
    progress: Reporter = Silent,
    start: Start = Worker,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Measures the points whose key has `only` in it, except those that the ledger has settled.

    After `limit_s` it stops, in the middle of a point if need be. Raises ExperimentError where
    there is no such point, WorkerDied or WorkerLate when the first process does not start.
    """
    deadline = clock() + limit_s
    chosen = choose(experiment, only)
    with (
        _Workers(experiment, start) as workers,
        progress(f"measuring {experiment.name}", len(chosen), "points") as bar,
    ):
        device = workers.get(chosen[0].settings.flags).device
        settled = latest((r for r in ledger.records if r.settled), commit, device)
        for done, point in enumerate(_by_flags(chosen)):
            bar.update(done, detail=point.key)
            if point.key in settled:
                continue
            started, started_s = datetime.now(UTC), clock()
            if started_s >= deadline:
                break
            answer = _ask(workers, point, experiment.point_limit_s, lambda: deadline - clock())
            if answer is None:
                break
            record = Record(
                key=point.key,
                **point.to_dict(),
                commit=commit,
                device=device,
                **asdict(answer),
                started=started.isoformat(timespec="seconds"),
                wall_s=round(clock() - started_s, 3),
            )
            ledger.append(record)
            if not record.settled:
                # What failed may have left it without memory, or dead.
                workers.stop()
        else:
            bar.update(len(chosen))
    return known(experiment, latest(ledger.records, commit, device))


def choose(experiment: Experiment, only: str) -> list[Point]:
    """Raises ExperimentError when no point's key has `only` in it."""
    chosen = [point for point in experiment.points if only in point.key]
    if not chosen:
        raise ExperimentError(
            f"no point of {experiment.name} has {only!r} in its name; they are such as "
            f"{experiment.points[0].key!r}"
        )
    return chosen


def known(experiment: Experiment, found: Mapping[str, Record]) -> Run:
    """What `found`, by key, has of the experiment's points."""
    return Run(
        [_with_settings_of(p, found[p.key]) for p in experiment.points if p.key in found],
        [point for point in experiment.points if point.key not in found],
    )


def _with_settings_of(point: Point, record: Record) -> Record:
    """An older record lacks settings that came later; they have their default in `point`."""
    settings = asdict(point.settings)
    return replace(
        record,
        settings={name: record.settings.get(name, value) for name, value in settings.items()},
    )


class _Workers:
    """The one process that is alive: another's flags end it."""

    def __init__(self, experiment: Experiment, start: Start) -> None:
        self._experiment = experiment
        self._start = start
        self._alive: tuple[str, Worker] | None = None

    def get(self, flags: str) -> Worker:
        if self._alive is None or self._alive[0] != flags:
            self.stop()
            worker = self._start(self._experiment.devices, self._experiment.hardware, flags)
            self._alive = (flags, worker)
        return self._alive[1]

    def stop(self) -> None:
        if self._alive is not None:
            self._alive[1].close()
            self._alive = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _ask(
    workers: _Workers, point: Point, point_limit_s: float, left_s: Callable[[], float]
) -> Answer | None:
    """None where the run's time ended before the point's.

    A process that does not start fails its point alone: flags may be ones that XLA does not know.
    """
    is_cut = False
    try:
        worker = workers.get(point.settings.flags)
        limit_s = max(0.0, left_s())
        is_cut = limit_s < point_limit_s
        return worker.measure(point, min(point_limit_s, limit_s))
    except WorkerLate as error:
        return None if is_cut else Answer("timed out", str(error), {})
    except WorkerDied as error:
        return Answer("failed", str(error), {})


def _by_flags(points: Sequence[Point]) -> list[Point]:
    """Those of the same flags together, so that each set of flags takes one process."""
    places = {flags: i for i, flags in enumerate(dict.fromkeys(p.settings.flags for p in points))}
    return sorted(points, key=lambda point: places[point.settings.flags])
