"""Starts timed stage by stage, and what a report makes of them."""

import itertools
import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import start, start_worker
from bench.start import run
from bench.start_worker import LOAD, STAGES, Start, Stopwatch
from model.families import UnsupportedModel
from serve.config import ConfigError
from serve.errors import RequestError
from tests.serve.test_build import MODEL, SCHEDULE
from tools.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, MODEL, "bfloat16")
    return directory


def test_a_start_is_timed_from_its_creation_to_its_first_token(checkpoint, monkeypatch):
    seconds = itertools.count(101.0)
    monkeypatch.setattr(start_worker, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    watch = Stopwatch(100.0)
    values = {"model": {"path": str(checkpoint)}, "schedule": SCHEDULE}
    found = start_worker.run(watch, values)
    assert tuple(found.seconds) == STAGES
    assert all(taken >= 1 for taken in found.seconds.values()), "each stage was met"
    assert found.total_s == next(seconds) - 101, "and nothing is left out"
    assert found.weight_bytes > 2 * 101 * 32 * 2, "the embedding and the head alone take as much"
    assert found.platform == "cpu"
    assert found.num_programs == 4
    assert 0 <= found.num_kept <= 4


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Starts take 10 s, then 5, 4 and 3, and plain reads a second; where each kept programs."""
    found: list[str] = []

    def a_start(config, kept):
        found.append(kept)
        seconds = dict.fromkeys(STAGES, 0.0)
        seconds["programs"] = 8.0 if len(found) == 1 else 5.0 - len(found)
        seconds[LOAD] = 2.0
        return Start(seconds, "gpu", 10**9, 16, 0 if len(found) == 1 else 16)

    monkeypatch.setattr(start, "_start", a_start)
    monkeypatch.setattr(start, "read_apart_s", lambda checkpoint, keep: 2.0 if keep else 1.0)
    monkeypatch.setattr(start, "forget", lambda files: True)
    return found


def test_later_starts_find_the_programs_of_the_first(checkpoint, starts):
    report = run(checkpoint, repeats=3)
    assert len(starts) == 4
    assert len(set(starts)) == 1
    assert not Path(starts[0]).exists(), "nothing is left behind"
    assert (report.first.num_kept, report.later[0].num_kept) == (0, 16)


def test_a_report_tells_medians_and_the_share_of_the_disks_rate(checkpoint, starts):
    report = run(checkpoint, ["model.dtype=float32"], repeats=3)
    text = report.to_markdown()
    assert "| loading weights | 2.00 | 2.00 (2.00 to 2.00) |" in text
    assert "| until the first token | 10.00 | 4.00 (3.00 to 5.00) |" in text
    assert "kept from an earlier start 0 in the first, 16 in the second" in text
    assert "read from the disk at" in text
    assert "50% of the" in text
    assert f"{checkpoint} model.dtype=float32." in text
    figures = json.loads(report.to_json())["figures"]
    assert figures == {"first_s": 10.0, "second_s": 4.0, "load_share": 0.5}


def test_reads_keep_what_they_read_where_the_hosts_memory_is_the_devices(checkpoint, monkeypatch):
    seconds = dict.fromkeys(STAGES, 4.0)
    monkeypatch.setattr(start, "_start", lambda *_: Start(seconds, "cpu"))
    monkeypatch.setattr(start, "read_apart_s", lambda checkpoint, keep: 2.0 if keep else 1.0)
    report = run(checkpoint, repeats=1)
    assert report.load_share == 0.5
    assert "by 8 threads, which keep what they read" in report.to_markdown()


def test_reads_from_memory_are_called_so(checkpoint, starts, monkeypatch):
    monkeypatch.setattr(start, "forget", lambda files: False)
    assert "read from memory at" in run(checkpoint, repeats=1).to_markdown()


def test_missing_bytecode_is_told_with_its_remedy(checkpoint, starts):
    report = replace(run(checkpoint, repeats=1), has_bytecode=False)
    assert "-m compileall -q" in report.to_markdown()
    assert "compileall" not in replace(report, has_bytecode=True).to_markdown()


def test_each_start_is_a_process_of_its_own_told_where_programs_are_kept(checkpoint, monkeypatch):
    told = {}

    def run_process(command, **options):
        told.update(options, command=command)
        return subprocess.CompletedProcess(
            command, 0, stdout=f"a line\n{json.dumps(asdict(Start()))}"
        )

    monkeypatch.setattr(start.subprocess, "run", run_process)
    config = start.make_config({"model": {"path": str(checkpoint)}}, "test")
    assert start._start(config, "there") == Start()
    assert told["command"][1:3] == ["-m", "bench.start_worker"]
    assert told["env"]["JAX_COMPILATION_CACHE_DIR"] == "there"
    assert json.loads(told["input"]) == {"model": {"path": str(checkpoint)}}


def test_a_start_that_fails_is_told(checkpoint, monkeypatch):
    ended = subprocess.CompletedProcess([], 3, stdout="")
    monkeypatch.setattr(start.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RequestError, match="a start ended with exit status 3; see above why"):
        run(checkpoint)


def test_what_cannot_be_served_is_refused_before_anything_starts(checkpoint, tmp_path, starts):
    with pytest.raises(ConfigError, match="a=1"):
        run(checkpoint, ["a=1"])
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"architectures": ["Novel"]}))
    with pytest.raises(UnsupportedModel, match="Novel"):
        run(tmp_path)
    assert not starts
