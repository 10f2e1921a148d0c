"""`make gpu-report`: all that is asked of a GPU, measured in one command of bounded time.

    python3 -m plan.gpu_report --limit-s 560

It runs the experiment gpu-report as `weft mesh` would, with programs compiled ahead in threads, and
needs nothing but this tree and a Python that has JAX with a GPU. What was cut goes on from where it
was when the command is given again. Results go to bench/results, and to $OUT where that is set. It
imports no JAX, and does not know what is measured.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import dropwhile, groupby, takewhile
from pathlib import Path

from plan.ahead import Prepares
from plan.devices import Devices
from plan.drive import known, run
from plan.experiment import Experiment, ExperimentError, Point, read_experiment
from plan.gpu_results import Results
from plan.gpu_tables import summary, to_dict, to_markdown
from plan.ledger import Ledger, LedgerError, Record, latest, read_records
from plan.machine import ROOT, sources
from plan.worker import Answer, Worker, WorkerDied, WorkerLate
from serve.progress import Progress

EXPERIMENT = ROOT / "configs" / "experiments" / "gpu-report.toml"
RESULTS = ROOT / "bench" / "results"
LEDGERS = ROOT / ".cache" / "gpu-report"

LIMIT_S = 560.0
"""Such machines are lent for ten minutes a command: the rest is for writing and carrying."""
AT_ONCE = 8
"""Points whose programs are compiled together: with more, the first would wait long."""

ENVIRONMENT = {
    # As `weft serve` takes it (serve/commands/devices.py, which needs more packages).
    "XLA_CLIENT_MEM_FRACTION": "0.95",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # What was compiled and tuned once need not be in the next process, nor in the next run.
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # Peers would look for newer kernels.
    "HF_HUB_OFFLINE": "1",
}
OLDER_NAMES = {"XLA_CLIENT_MEM_FRACTION": "XLA_PYTHON_CLIENT_MEM_FRACTION"}
"""JAX refuses both at once."""
FOR_PEERS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The process that starts a peer leaves it the device's memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was measured; peers that are not there, and what doesn't fit, aside."""
    arguments = _parse(argv)
    command = shlex.join(["python3", "-m", "plan.gpu_report", *(argv or sys.argv[1:])])
    # Whoever ends it wants what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        experiment = read_experiment(arguments.experiment)
        ledger = arguments.ledger or LEDGERS / f"{experiment.name}.jsonl"
        _check_apart(ledger, [arguments.out, *_out()])
        with _Copied(ledger, arguments.fresh, _out()) as records:
            if not arguments.fresh:
                _adopt(records, arguments.out, sources())
            results = _measure(experiment, records, arguments.limit_s)
            if results.records:
                _write(results, command, ledger, [arguments.out, *_out()])
            for problem in results.problems:
                print(f"gpu-report: {problem}", file=sys.stderr)
    except (ExperimentError, LedgerError) as error:
        print(f"gpu-report: {error}", file=sys.stderr)
        return 2
    return 0 if results.is_complete else 1


class AheadWorker(Worker):
    """Has the programs of several points compiled together before it measures the first."""

    def __init__(
        self,
        devices: Devices,
        hardware: str | None = None,
        flags: str = "",
        *,
        points: Sequence[Point],
        unlucky: set[str],
    ) -> None:
        """`unlucky` are keys of points that a process died over before they were measured."""
        super().__init__(devices, hardware, flags)
        self._points, self._unlucky = points, unlucky
        self._prepared: set[str] = set()

    def measure(self, point: Point, limit_s: float) -> Answer:
        deadline = time.monotonic() + limit_s
        if point.key not in self._prepared | self._unlucky:
            self._prepare_from(point, limit_s)
        return super().measure(point, max(0.0, deadline - time.monotonic()))

    def _prepare_from(self, point: Point, limit_s: float) -> None:
        """Together with the points after it that are of its kind and process."""
        if not isinstance(point.settings, Prepares):
            return
        later = dropwhile(lambda other: other != point, self._points)
        alike = takewhile(lambda other: other.kind == point.kind, later)
        group = [p for p in alike if p.settings.flags == point.settings.flags][:AT_ONCE]
        keys = {other.key for other in group}
        try:
            self.prepare(group, limit_s)
        except (WorkerDied, WorkerLate) as error:
            # Which of them it was is found one by one.
            self._unlucky |= keys
            raise type(error)(f"while the next {len(group)} were compiled: {error}") from None
        self._prepared |= keys


def _measure(experiment: Experiment, ledger: Ledger, limit_s: float) -> Results:
    """Each stage as far as time allows; what a worker can't begin with is told and left out."""
    deadline, commit = time.monotonic() + limit_s, sources()
    device: str | None = None
    problems: list[str] = []
    try:
        for peers, stage in _stages(experiment):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            settled = {r.key for r in ledger.records if r.settled and r.commit == commit}
            points = [point for point in stage.points if point.key not in settled]
            start = partial(AheadWorker, points=points, unlucky=set())
            with _environment(ENVIRONMENT | (FOR_PEERS if peers else {})):
                try:
                    found = run(
                        stage, ledger, commit, limit_s=left_s, progress=Progress, start=start
                    )
                except (WorkerDied, WorkerLate) as error:
                    problems.append(str(error))
                    if device is None:
                        break  # nothing else would find one
                    continue
            device = found.records[0].device if found.records else device
    except KeyboardInterrupt:
        problems.append("stopped from outside")
    records = latest(ledger.records, commit, device)
    return Results(experiment, known(experiment, records), problems)


def _stages(experiment: Experiment) -> Iterator[tuple[bool, Experiment]]:
    """Points in their order, peers apart: they need a process that holds no memory."""
    for peers, points in groupby(experiment.points, key=lambda point: point.kind == "peer"):
        yield peers, replace(experiment, points=tuple(points))


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What workers inherit meanwhile; what the user has set stays."""
    new = {
        name: value
        for name, value in values.items()
        if name not in os.environ and not os.environ.get(OLDER_NAMES.get(name, name))
    }
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


class _Copied(Ledger):
    """A ledger of which there is a copy in each of `folders` at any moment."""

    def __init__(self, path: Path, fresh: bool, folders: Sequence[Path]) -> None:
        super().__init__(path, fresh)
        self._folders = folders

    def append(self, record: Record) -> None:
        super().append(record)
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path, folder / self.path.name)


def _check_apart(ledger: Path, folders: Sequence[Path]) -> None:
    """Raises LedgerError where a copy of the ledger, which is removed at the end, would be it."""
    for folder in folders:
        if ledger.resolve().parent == folder.resolve():
            raise LedgerError(
                f"--ledger {ledger} lies where results are written, {folder}; put it elsewhere"
            )


def _adopt(ledger: Ledger, folder: Path, commit: str) -> None:
    """Takes in what runs of `commit` have left in `folder`, if on a machine that is gone now."""
    found = [record for path in sorted(folder.glob("*.jsonl")) for record in read_records(path)]
    for record in found:
        if record.commit == commit and record not in ledger.records:
            ledger.append(record)


def _write(results: Results, command: str, ledger: Path, folders: Sequence[Path]) -> None:
    """The same four files everywhere, flat; what matters most goes to stdout."""
    name, whole = results.name, to_dict(results, command)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        # The ledger's copy, from while it ran.
        (folder / ledger.name).unlink(missing_ok=True)
        lines = [json.dumps(record) + "\n" for record in whole["records"]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        (folder / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n")
        picture = _draw(results, folder / f"{name}.png")
        (folder / f"{name}.md").write_text(to_markdown(results, command, picture))
    print(summary(results))
    print(f"{folders[0] / name}.md")


def _draw(results: Results, path: Path) -> str | None:
    """The picture's name; None without matplotlib, or without anything to draw."""
    if not results.curves:
        return None
    try:
        from plan.pictures import draw_curves
    except ModuleNotFoundError:
        return None
    draw_curves(results.curves, results.device, path)
    return path.name


def _out() -> list[Path]:
    """Where a machine that is lent wants what is to be carried back."""
    return [Path(folder)] if (folder := os.environ.get("OUT")) else []


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("experiment", nargs="?", type=Path, default=EXPERIMENT)
    parser.add_argument(
        "--limit-s", type=float, default=LIMIT_S, help="stop after as long; the next run goes on"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--ledger", type=Path, help="what a run that was cut goes on from")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
