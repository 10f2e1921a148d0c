"""`weft mesh`: experiments from their files to a ledger, a report and pictures.

A run may be cut at any moment: the same command goes on, and the report is made of all there is.
"""

import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path

import typer

from plan.drive import Run, choose, known, run
from plan.experiment import Experiment, ExperimentError, find_experiments, read_experiment
from plan.kinds import KINDS
from plan.ledger import Ledger, LedgerError, latest, read_records
from plan.machine import sources
from plan.report import Report
from plan.worker import WorkerDied, WorkerLate
from serve.errors import RequestError
from serve.progress import Progress

RECORDS, REPORT = "records.jsonl", "report.md"


def measure(
    path: Path, out: Path, only: str, limit_s: float, fresh: bool, *, as_json: bool
) -> bool:
    """Whether all points that were asked for are settled. Raises RequestError."""
    chosen = _read(path, only)
    deadline, commit = time.monotonic() + limit_s, sources()
    reports: list[Report] = []
    problems: list[str] = []
    try:
        for file, experiment in chosen.items():
            left_s = max(0.0, deadline - time.monotonic())
            try:
                with Ledger(out / experiment.name / RECORDS, fresh) as ledger:
                    found = run(
                        experiment, ledger, commit, only=only, limit_s=left_s, progress=Progress
                    )
            except (LedgerError, WorkerDied, WorkerLate) as error:
                # Other experiments may be for devices that are there.
                problems.append(f"{file} was not measured: {error}")
                continue
            reports.append(_write(file, out, experiment, found, as_json=as_json))
    except KeyboardInterrupt:
        print("weft mesh: stopped; the same command goes on from here", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    if problems:
        raise RequestError("\n".join(problems))
    return all(_is_settled(report, only) for report in reports)


def report(path: Path, out: Path, *, as_json: bool) -> None:
    """What the ledgers have, whatever commit and device it is of; measures nothing."""
    reports: list[Report] = []
    for file, experiment in _read(path).items():
        try:
            records = read_records(out / experiment.name / RECORDS)
        except LedgerError as error:
            raise RequestError(str(error)) from error
        found = known(experiment, latest(records))
        reports.append(_write(file, out, experiment, found, as_json=as_json))
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))


def _read(path: Path, only: str = "") -> dict[Path, Experiment]:
    """The experiments that have a point of `only`, all read before the first is run."""
    try:
        found = {file: read_experiment(file) for file in find_experiments(path)}
        chosen = {file: e for file, e in found.items() if any(only in p.key for p in e.points)}
        if not chosen:
            choose(next(iter(found.values())), only)  # refuses, with an example
    except ExperimentError as error:
        raise typer.BadParameter(str(error)) from error
    return chosen


def _is_settled(report: Report, only: str) -> bool:
    settled = {record.key for record in report.run.records if record.settled}
    return all(point.key in settled for point in choose(report.experiment, only))


def _write(file: Path, out: Path, experiment: Experiment, found: Run, *, as_json: bool) -> Report:
    """The report as Markdown beside the ledger, and in short on stdout."""
    folder = out / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    written = Report(experiment, found, shlex.join(["weft", "mesh", str(file), "--out", str(out)]))
    pictures = _draw(written, folder) if importlib.util.find_spec("matplotlib") else None
    (folder / REPORT).write_text(written.to_markdown(pictures), encoding="utf-8")
    if not as_json:
        print(f"{written.summary()}\n{folder / REPORT}")
    return written


def _draw(report: Report, folder: Path) -> list[str]:
    from plan.pictures import draw

    names: list[str] = []
    for kind, records in report.kinds.items():
        if (contest := KINDS[kind].contest) is not None:
            names += draw(contest, records, folder, kind)
    return names
