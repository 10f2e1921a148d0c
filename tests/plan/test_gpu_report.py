"""The report's command: groups compiled ahead, runs cut and gone on with, files where wanted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plan import gpu_report, worker
from plan.ahead import Prepares
from plan.devices import Devices
from plan.experiment import Point, make_point, read_experiment
from plan.gpu_report import EXPERIMENT, ROOT, AheadWorker, main
from plan.worker import Answer, WorkerDied
from serve.commands.devices import MEMORY_FRACTION, MEMORY_VARIABLES

DRY = EXPERIMENT.with_name("gpu-report-dry.toml")

SMALL = """
title = "Small"
devices = "cpu:1"

[[matrix]]
kind = "device"
work = "product"
size = [8, 16]
repeats = 1

[[matrix]]
kind = "peer"
engine = "transformers-compiled"
model = "tiny"
concurrency = 1

[[matrix]]
kind = "device"
work = "copy"
copy_bytes = 4000
repeats = 1
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a run of seconds; results go to `results`, the ledger aside."""
    monkeypatch.delenv("OUT", raising=False)
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return [str(file), "--out", str(tmp_path / "results"), "--ledger", str(tmp_path / "kept.jsonl")]


def read(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


class InProcess:
    """A worker without a process."""

    device = "1 virtual device of a test"

    def __init__(self, devices: Devices, hardware: str | None, flags: str, **_: Any) -> None:
        self.devices = devices

    def measure(self, point: Point, limit_s: float) -> Answer:
        return worker.answer(point.to_dict(), self.devices, None)

    def close(self) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "AheadWorker", InProcess)


@pytest.mark.usefixtures("in_process")
def test_it_is_cut_and_goes_on_and_tells_what_is_missing(small, tmp_path, capsys) -> None:
    assert main([*small, "--limit-s", "0"]) == 1
    assert not (tmp_path / "results").exists(), "nothing is written of nothing"

    assert main(small) == 0
    found = read(tmp_path / "results")
    statuses = {record["kind"]: record["status"] for record in found["records"]}
    assert statuses == {"device": "ok", "peer": "failed"}
    assert "No module named 'torch'" in capsys.readouterr().out
    assert sorted(path.suffix for path in (tmp_path / "results").iterdir()) == [
        ".json",
        ".jsonl",
        ".md",
    ]

    started = [record["started"] for record in found["records"] if record["kind"] == "device"]
    kept = tmp_path / "kept.jsonl"
    kept.unlink()
    assert main(small) == 0, "the results are enough to go on from"
    again = [r["started"] for r in read(tmp_path / "results")["records"] if r["kind"] == "device"]
    assert again == started

    assert main([*small, "--fresh"]) == 0
    assert len(kept.read_text().splitlines()) == 4


@pytest.mark.usefixtures("in_process")
def test_results_are_where_a_lent_machine_wants_them_while_it_runs(
    small, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    seen: list[int] = []
    write = gpu_report._write

    def look(*arguments: Any) -> None:
        seen.append(len((out / "kept.jsonl").read_text().splitlines()))
        write(*arguments)

    monkeypatch.setattr(gpu_report, "_write", look)
    assert main(small) == 0
    assert seen == [4], "the ledger was there before the report"
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names


def test_a_gpus_memory_is_taken_as_a_server_takes_it(monkeypatch) -> None:
    name, older = MEMORY_VARIABLES
    assert {name: older} == gpu_report.OLDER_NAMES
    for variable in MEMORY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with gpu_report._environment(gpu_report.ENVIRONMENT):
        assert os.environ[name] == MEMORY_FRACTION
    assert name not in os.environ
    monkeypatch.setenv(older, "0.5")
    with gpu_report._environment(gpu_report.ENVIRONMENT):
        assert name not in os.environ, "JAX refuses both at once"


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "gpu.toml"
    file.write_text('title = "x"\ndevices = "gpu"\n[[matrix]]\nkind = "device"\nwork = "copy"\n')
    arguments = [str(file), "--out", str(tmp_path / "results"), "--ledger", str(tmp_path / "l")]
    assert main(arguments) == 1
    assert capsys.readouterr().err.count("there is no GPU, only cpu") == 1
    assert not (tmp_path / "results").exists()


def test_a_ledger_that_lies_where_results_are_written_is_refused(small, tmp_path, capsys) -> None:
    assert main([*small[:3], "--ledger", str(tmp_path / "results" / "kept.jsonl")]) == 2
    assert "lies where results are written" in capsys.readouterr().err


def test_a_file_that_is_no_experiment_is_refused(tmp_path, capsys) -> None:
    assert main([str(tmp_path / "none.toml"), "--ledger", str(tmp_path / "l")]) == 2
    assert "none.toml cannot be read" in capsys.readouterr().err


def points(*settings: dict[str, Any]) -> list[Point]:
    return [make_point("step", {"model": "tiny", "context": 40, **one}) for one in settings]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Workers without a process: what they were asked for, and in which order."""
    found: list[Any] = []

    def prepare(self: worker.Worker, group: Any, limit_s: float) -> None:
        found.append([point.key for point in group])
        if any("batch=13" in point.key for point in group):
            raise WorkerDied("a compiler came loose")

    def measure(self: worker.Worker, point: Point, limit_s: float) -> Answer:
        found.append(point.key)
        return Answer("ok", "", {})

    monkeypatch.setattr(worker.Worker, "__init__", lambda *_: None)
    monkeypatch.setattr(worker.Worker, "prepare", prepare)
    monkeypatch.setattr(worker.Worker, "measure", measure)
    return found


def test_points_of_a_kind_and_process_are_compiled_together_once(asked) -> None:
    some = points({}, {"batch": 2}, {"batch": 3, "flags": "--x"}, {"batch": 4})
    ahead = AheadWorker(Devices("cpu", 1), points=some, unlucky=set())
    for point in (some[0], some[1], some[3]):
        ahead.measure(point, 10)
    one, two, _, four = (point.key for point in some)
    assert asked == [[one, two, four], one, two, four]


def test_a_process_that_died_over_a_group_is_followed_by_one_that_compiles_each_alone(
    asked,
) -> None:
    some = points({}, {"batch": 13})
    unlucky: set[str] = set()
    with pytest.raises(WorkerDied, match="while the next 2 were compiled: a compiler came loose"):
        AheadWorker(Devices("cpu", 1), points=some, unlucky=unlucky).measure(some[0], 10)
    asked.clear()
    AheadWorker(Devices("cpu", 1), points=some, unlucky=unlucky).measure(some[1], 10)
    assert asked == [some[1].key]


def test_a_point_that_needs_no_program_is_not_waited_for(asked) -> None:
    point = make_point("device", {"work": "copy"})
    assert not isinstance(point.settings, Prepares)
    AheadWorker(Devices("cpu", 1), points=[point], unlucky=set()).measure(point, 10)
    assert asked == [point.key]


@pytest.mark.parametrize("path", [EXPERIMENT, DRY])
def test_an_experiment_opens_with_its_command_hardware_and_expectation(path: Path) -> None:
    comment = path.read_text().partition("title")[0]
    assert all(word in comment for word in ("gpu", "Hardware:", "Expected:"))


def test_every_kind_of_the_report_is_in_the_dry_run() -> None:
    """So that nothing in its path is run for the first time on a GPU."""

    def paths(path: Path) -> set[tuple[str, str]]:
        found = set[tuple[str, str]]()
        for point in read_experiment(path).points:
            settings = point.to_dict()["settings"]
            found.add((point.kind, settings.get("operation", "") or settings.get("phase", "")))
        return found

    assert paths(EXPERIMENT) == paths(DRY)


def test_the_dry_run_finds_no_fault_and_needs_no_pydantic(tmp_path: Path) -> None:
    """As on a machine with GPUs, which has neither it nor Weft installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pydantic'] = None\n")
    options = ["--out", str(tmp_path / "results"), "--ledger", str(tmp_path / "kept.jsonl")]
    done = subprocess.run(
        [sys.executable, "-m", "plan.gpu_report", str(DRY), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path / "results")
    assert not found["missing"]
    statuses = {record["key"]: record["status"] for record in found["records"]}
    unmeasured = [key.split()[0] for key, status in statuses.items() if status != "ok"]
    expected = ["kernel", "kernel", "kernel", "kernel", "peer"]
    assert sorted(unmeasured) == expected, "what is not covered, and what is not there"
    (text,) = (path.read_text() for path in (tmp_path / "results").glob("*.md"))
    assert "NOT USABLE" not in text
