"""Plain reads of a checkpoint's files, and whether the system had them in memory."""

import os
from pathlib import Path

import pytest

from bench.disk import forget, read_s, weight_files


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


def test_reading_takes_time(files):
    assert read_s(files) > 0


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
