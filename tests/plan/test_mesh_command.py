"""`weft mesh` from the command line to the report, with a worker of its own."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest

from plan import drive
from plan.worker import Answer, WorkerDied
from serve import cli

EXPERIMENT = """
title = "Two"
devices = "cpu:2"

[[matrix]]
kind = "step"
model = "tiny"
mesh = ["", "stage=2"]
context = 20
page_size = 16
repeats = 2
"""


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `weft mesh` on the file; its exit code, stdout and stderr."""
    file = tmp_path / "two.toml"
    file.write_text(EXPERIMENT)

    def run(*options: str, path: Path = file) -> tuple[int, str, str]:
        arguments = ["weft", "mesh", str(path), "--out", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_an_experiment_is_measured_in_part_and_reported_with_what_is_missing(weft, tmp_path: Path):
    folder = tmp_path / "out" / "two"
    code, out, err = weft("--only", "tiny context")
    assert code == 0, err
    assert "2 points: 1 ok, 1 not measured yet" in out
    assert str(folder / "report.md") in out
    text = (folder / "report.md").read_text()
    assert "- step model=tiny mesh=stage=2 context=20" in text
    assert all((folder / name).is_file() for name in re.findall(r"!\[(.+?)\]", text))
    (line,) = (folder / "records.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["settings"]["mesh"] == ""
    assert record["device"].startswith("2 virtual devices on ")
    assert record["figures"]["collectives"] == {}
    assert record["figures"]["tokens_per_s"] > 0

    (folder / "records.jsonl").write_text(line.replace(record["commit"], "elsewhere") + "\n")
    code, out, _ = weft("--report-only", "--json")
    assert code == 0
    (reported,) = json.loads(out)
    assert [found["commit"] for found in reported["records"]] == ["elsewhere"]
    assert reported["missing"] == ["step model=tiny mesh=stage=2 context=20 page_size=16 repeats=2"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title", "titel", "there is no key titel; did you mean title?"),
        ('"tiny"', '"tinny"', "there is no model tinny"),
        ('kind = "step"', 'kind = "stepp"', "there is no kind stepp; did you mean step?"),
    ],
)
def test_a_wrong_file_is_refused_by_name(weft, tmp_path: Path, old: str, new: str, said: str):
    (tmp_path / "two.toml").write_text(EXPERIMENT.replace(old, new))
    code, out, err = weft()
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_point_has_is_refused_with_one_that_some_has(weft):
    code, _, err = weft("--only", "tensor=4")
    assert code == 2
    assert "no point of two has 'tensor=4'" in " ".join(err.split())


def test_a_broken_ledger_ends_in_one_line(weft, tmp_path: Path):
    ledger = tmp_path / "out" / "two" / "records.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.write_text("nonsense\n")
    for options in ((), ("--report-only",)):
        code, _, err = weft(*options)
        assert code == 1
        assert f"{ledger}:1 is not a record" in err


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without a process: one device can't be had, and on three stage=2 fails."""

    class InProcess:
        def __init__(self, devices, hardware, flags):
            if devices.count == 1:
                raise WorkerDied("there is no such device")
            self.device = str(devices)

        def measure(self, point, limit_s):
            fails = self.device == "cpu:3" and "stage=2" in point.key
            return Answer("failed" if fails else "ok", "", {})

        def close(self):
            pass

    monkeypatch.setattr("serve.commands.mesh.run", partial(drive.run, start=InProcess))
    monkeypatch.setattr("serve.commands.mesh._draw", lambda *_: [])
    monkeypatch.setattr("plan.report.decide", lambda *_: [])


@pytest.mark.usefixtures("in_process")
def test_a_point_that_failed_is_not_made_good_by_its_like_in_another_experiment(weft, tmp_path):
    (tmp_path / "a.toml").write_text(EXPERIMENT.replace("cpu:2", "cpu:3"))
    code, out, _ = weft(path=tmp_path)
    assert "2 points: 1 ok, 1 failed" in out
    assert code == 1


@pytest.mark.usefixtures("in_process")
def test_experiments_whose_devices_are_there_are_measured_beside_one_whose_are_not(weft, tmp_path):
    (tmp_path / "a.toml").write_text(EXPERIMENT.replace("cpu:2", "cpu:1").replace("stage=2", ""))
    code, out, err = weft(path=tmp_path)
    assert "2 points: 2 ok" in out
    assert code == 1
    assert err.endswith(f"weft: {tmp_path / 'a.toml'} was not measured: there is no such device\n")
