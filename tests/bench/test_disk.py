"""Plain reads of a checkpoint's files, and whether the system had them in memory."""

import os
from pathlib import Path

import pytest

from bench.disk import forget, read_apart_s, read_s, weight_files


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for i in range(3):
        (tmp_path / f"{i}.safetensors").write_bytes(os.urandom(1 << 20))
    return weight_files(tmp_path)


def test_weights_are_the_safetensors(files, tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    assert weight_files(tmp_path) == files
    assert len(files) == 3


def test_weights_of_a_converted_checkpoint_are_its_arrays(files, tmp_path):
    (tmp_path / "weights" / "head" / "c").mkdir(parents=True)
    (tmp_path / "weights" / "head" / "c" / "0").touch()
    assert weight_files(tmp_path) == [tmp_path / "weights" / "head" / "c" / "0"]


@pytest.mark.parametrize("keep", [False, True])
def test_every_byte_is_read(files, keep, monkeypatch):
    monkeypatch.setattr("bench.disk.BLOCK_BYTES", 100_000)
    before = _bytes_read()
    assert read_s(files, keep) > 0
    assert _bytes_read() - before >= 3 << 20


def _bytes_read() -> int:
    """By this process, from wherever."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_reads_apart_are_of_a_process_of_its_own(files, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.disk.read_s", None)
    assert read_apart_s(tmp_path, keep=True) > 0


def test_small_files_that_stay_in_memory_do_not_count(files, monkeypatch, tmp_path):
    (tmp_path / "zarr.json").write_text("{}")
    monkeypatch.setattr("bench.disk._share_in_memory", lambda path: path.name == "zarr.json")
    assert forget([*files, tmp_path / "zarr.json"])


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_s([tmp_path / "absent"])


def test_files_that_stay_in_memory_are_not_said_to_be_cold(files, monkeypatch):
    monkeypatch.setattr("os.posix_fadvise", lambda *_: None)
    read_s(files)
    assert not forget(files)


def test_a_file_system_that_cannot_say_is_not_said_to_be_cold(files, monkeypatch):
    def preadv(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.preadv", preadv)
    assert not forget(files)


def test_files_that_the_system_let_go_of_are_cold(files, monkeypatch):
    def preadv(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr("os.preadv", preadv)
    assert forget(files)
