"""A run measures what is missing, whatever becomes of a point or of the run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from plan.drive import Run, known, run
from plan.experiment import ExperimentError, Point
from plan.ledger import Ledger, Record, read_records
from plan.machine import ROOT
from plan.worker import Answer, Worker, WorkerDied, WorkerLate
from tests.plan.fake_kind import experiment, start

pytestmark = pytest.mark.usefixtures("fakes")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def drive(path: Path, *, commit: str = "abc", only: str = "", **settings: Any) -> Run:
    with Ledger(path) as ledger:
        return run(experiment(**settings), ledger, commit, only=only, start=start)


def begun(log: Path) -> list[str]:
    """The numbers of the points begun since this was asked last."""
    numbers = [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
    log.write_text("")
    return numbers


def statuses(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [(record.settings["do"], record.status) for record in records]


def test_every_point_is_recorded_with_what_it_was_measured_on(path: Path):
    found = drive(path, number=[1, 2])
    assert [record.figures["number"] for record in found.records] == [1, 2]
    assert found.records[0].figures["devices"] == "cpu:2 cpu"
    assert {(r.commit, r.device, r.kind) for r in found.records} == {("abc", "fake cpu:2", "fake")}
    assert found.missing == []
    assert read_records(path) == found.records


def test_a_point_that_comes_to_nothing_is_recorded_and_the_run_goes_on(path: Path):
    do = ["fail", "die", "run out", "not fit", "print", "60", "work"]
    found = drive(path, do=do, point_limit_s=1.5)
    assert statuses(found.records) == [
        ("fail", "failed"),
        ("die", "failed"),
        ("run out", "does not fit"),
        ("not fit", "does not fit"),
        ("print", "ok"),
        ("60", "timed out"),
        ("work", "ok"),
    ]
    reasons = [record.reason for record in found.records]
    assert reasons[0] == "KeyError: 'no such thing'"
    assert reasons[1] == "the process ended with status 3; it last wrote: a wire came loose"
    assert reasons[2] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory: 5 bytes"
    assert reasons[3] == "it needs 3 bytes a device, which has 2"
    assert found.records[3].figures == {"needed_bytes": 3}
    assert reasons[5] == "no answer within 1.5 s"


def test_a_process_that_does_not_start_fails_the_points_of_its_flags_alone(path: Path):
    def pick(devices, hardware, flags):
        module = "tests.plan.no_such_worker" if flags == "--xla_b" else "tests.plan.fake_kind"
        return start(devices, hardware, flags, module=module)

    with Ledger(path) as ledger:
        found = run(experiment(flags=["", "--xla_b", "--xla_c"]), ledger, "abc", start=pick)
    assert [record.status for record in found.records] == ["ok", "failed", "ok"]
    assert "No module named" in found.records[1].reason


def test_a_process_that_died_between_two_points_fails_the_second_alone(path: Path):
    class Dying(Worker):
        def measure(self, point: Point, limit_s: float) -> Answer:
            if "after death" in point.key:
                os.kill(self.pid, signal.SIGKILL)
                self._process.wait()
            return super().measure(point, limit_s)

    asked = experiment(do=["work", "after death", "work2"])
    with Ledger(path) as ledger:
        found = run(asked, ledger, "abc", start=partial(Dying, module="tests.plan.fake_kind"))
    assert [record.status for record in found.records] == ["ok", "failed", "ok"]
    assert found.records[1].reason.startswith("the process ended with status -9")


def test_flags_that_were_set_before_make_other_figures(path: Path, monkeypatch):
    with Ledger(path) as ledger:
        for flags in ("--xla_force_host_platform_device_count=8", "--xla_a", "--xla_a"):
            monkeypatch.setenv("XLA_FLAGS", flags)
            run(experiment(), ledger, "abc", start=start)
    devices = [record.device for record in read_records(path)]
    assert devices == ["fake cpu:2", "fake cpu:2, XLA_FLAGS --xla_a"]


def test_other_hardware_to_be_held_to_makes_other_figures(path: Path):
    with Ledger(path) as ledger:
        for hardware in ("cpu", "h100", "h100"):
            run(replace(experiment(), hardware=hardware), ledger, "abc", start=start)
    devices = [record.device for record in read_records(path)]
    assert devices == ["fake cpu:2", "fake cpu:2, held to h100"]


def test_a_record_without_a_setting_that_came_later_has_its_default(path: Path):
    drive(path)
    (record,) = read_records(path)
    older = {name: value for name, value in record.settings.items() if name != "number"}
    older["setting_of_old"] = ""
    found = known(experiment(number=[0, 1]), {record.key: replace(record, settings=older)})
    assert found.records == [record]


def test_a_later_run_measures_what_is_missing_and_tries_again_what_failed(path: Path, log: Path):
    asked = {"do": ["work", "not fit", "fail"], "log": str(log)}
    drive(path, number=1, **asked)
    assert begun(log) == ["1", "1", "1"]
    found = drive(path, number=[1, 2], **asked)
    assert len(found.records) == 6
    assert sorted(begun(log)) == ["1", "2", "2", "2"]
    drive(path, number=1, **asked, commit="def")
    assert begun(log) == ["1", "1", "1"]


def test_only_the_points_that_are_named_are_measured_and_the_others_are_missing(
    path: Path, log: Path
):
    found = drive(path, number=[1, 2, 3], log=str(log), only="number=2")
    assert begun(log) == ["2"]
    assert [point.to_dict()["settings"]["number"] for point in found.missing] == [1, 3]
    with pytest.raises(ExperimentError, match="no point of fakes has 'number=7' in its name"):
        drive(path, number=[1, 2, 3], only="number=7")


def test_points_of_the_same_flags_share_a_process_that_has_them(path: Path, log: Path):
    drive(path, flags=["", "--xla_a=1"], number=[1, 2], log=str(log))
    lines = [line.split(maxsplit=2) for line in log.read_text().splitlines()]
    assert [number for number, _, _ in lines] == ["1", "2", "1", "2"]
    plain, flagged = {pid for _, pid, _ in lines[:2]}, {pid for _, pid, _ in lines[2:]}
    assert len(plain) == len(flagged) == 1
    assert plain != flagged
    counts = "--xla_force_host_platform_device_count=2"
    assert [flags for _, _, flags in lines[1:3]] == [counts, f"{counts} --xla_a=1"]


def test_a_run_out_of_time_says_what_is_missing_and_records_nothing_of_the_point_it_cut(
    path: Path,
):
    asked = experiment(do=["work", "60", "work2"])
    with Ledger(path) as ledger:
        found = run(asked, ledger, "abc", limit_s=2, start=start)
    assert statuses(found.records) == [("work", "ok")]
    assert [point.key for point in found.missing] == ["fake do=60", "fake do=work2"]
    assert len(read_records(path)) == 1


def test_devices_that_cannot_be_had_end_the_run(path: Path):
    def refuse(devices, hardware, flags):
        return start(devices, hardware, flags, module="tests.plan.no_such_worker")

    with Ledger(path) as ledger, pytest.raises(WorkerDied, match="No module named"):
        run(experiment(), ledger, "abc", start=refuse)


def test_a_worker_that_does_not_start_in_time_is_ended(path: Path, monkeypatch):
    monkeypatch.setattr("plan.worker.START_LIMIT_S", 0.01)
    with Ledger(path) as ledger, pytest.raises(WorkerLate, match=r"within 0\.01 s"):
        run(experiment(), ledger, "abc", start=start)


DRIVE = """
import sys
from pathlib import Path
from plan.drive import run
from plan.kinds import KINDS
from plan.ledger import Ledger
from tests.plan.fake_kind import Fake, experiment, start
KINDS["fake"] = Fake
path, log = sys.argv[1:]
with Ledger(Path(path)) as ledger:
    run(experiment(do=["work", "60"], log=log), ledger, "abc", start=start)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_no_process_and_can_be_gone_on_with(
    path: Path, log: Path, ending: signal.Signals
):
    parent = subprocess.Popen(
        [sys.executable, "-c", DRIVE, path, log], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) == 2)
    worker = psutil.Process(int(log.read_text().split()[1]))
    parent.send_signal(ending)
    parent.wait(10)
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert statuses(read_records(path)) == [("work", "ok")]
    begun(log)
    found = drive(path, do=["work", "0.1"], log=str(log))
    assert [record.status for record in found.records] == ["ok", "ok"]
    assert len(begun(log)) == 1


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
