"""A converted checkpoint is read by region, whatever its files are, and says what is wrong."""

import errno
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import orbax_store
from model.checkpoint.manifest import Manifest, TensorRecord
from model.checkpoint.orbax_store import WEIGHTS, OrbaxSource, write_orbax
from model.checkpoint.source import Block, CheckpointError, TensorSpec

SHAPE = (20, 3, 33)
ARRAYS = {
    "gate_up": np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE),
    "layers.0.norm": np.linspace(0, 1, 7).astype(ml_dtypes.bfloat16),
    "numbers": np.arange(-100, 100).astype(np.int8).reshape(10, 20),
    "small": np.linspace(-2, 2, 64).astype(ml_dtypes.float8_e4m3fn).reshape(8, 8),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Files of at most 700 bytes, so that tensors have many."""
    directory = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_store, "FILE_BYTES", 700)
        patch.setattr(orbax_store, "MIN_CHUNK_BYTES", 64)
        write_orbax(
            directory / WEIGHTS,
            {name: TensorSpec(array.shape, array.dtype) for name, array in ARRAYS.items()},
            {name: len(array) for name, array in ARRAYS.items()},
            (Block(name, 0, array) for name, array in ARRAYS.items()),
        )
    records = {
        name: TensorRecord(shape=array.shape, dtype=array.dtype.name, sha256="")
        for name, array in ARRAYS.items()
    }
    Manifest(architecture="Test", tensors=records).save(directory)
    return directory


@pytest.fixture
def directory(written, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(written, tmp_path / "copy")


def files_of(directory, name):
    return sorted(path for path in (directory / WEIGHTS / name / "c").rglob("*") if path.is_file())


def test_tensors_of_many_files_are_read_whole(written):
    source = OrbaxSource(written)
    assert len(files_of(written, "gate_up")) > 8
    for name, array in ARRAYS.items():
        read = source.read(name)
        assert read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()
    finish(source)


@given(st.data())
def test_any_region_is_what_numpy_cuts(written, data):
    source = OrbaxSource(written)
    cuts = [data.draw(st.tuples(*[st.integers(0, size)] * 2).map(sorted)) for size in SHAPE]
    region = tuple(slice(*cut) for cut in cuts)
    np.testing.assert_array_equal(source.read("gate_up", region), ARRAYS["gate_up"][region])
    finish(source)


def finish(source: OrbaxSource) -> None:
    """Waits for what it reads ahead, or a later test would find files that it did not ask for."""
    source._fetchers.shutdown()


@pytest.fixture
def fetched(monkeypatch):
    """The files that were read ahead, instead of reading them."""
    found: list[int] = []

    def sendfile(out, into, offset, count):
        found.append(os.fstat(into).st_ino)
        return count

    monkeypatch.setattr("os.sendfile", sendfile)
    return found


def inodes(directory, *names):
    return {file.stat().st_ino for name in names for file in files_of(directory, name)}


def test_a_file_is_fetched_once_however_many_regions_are_read_of_it(written, fetched, monkeypatch):
    monkeypatch.setattr(orbax_store, "AHEAD_BYTES", 0)
    source = OrbaxSource(written)
    for place in range(33):
        source.read("gate_up", (slice(None), slice(None), slice(place, place + 1)))
    assert len(fetched) == len(set(fetched))
    assert set(fetched) == inodes(written, "gate_up")


def test_the_tensors_that_come_next_are_fetched_ahead(written, fetched, monkeypatch):
    names = list(OrbaxSource(written).specs)
    monkeypatch.setattr(orbax_store, "AHEAD_BYTES", ARRAYS[names[2]].nbytes + 1)
    source = OrbaxSource(written)
    source.read(names[1])
    finish(source)
    assert set(fetched) == inodes(written, *names[1:])


def test_a_file_system_that_cannot_fetch_is_read_all_the_same(written, monkeypatch):
    def sendfile(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.sendfile", sendfile)
    np.testing.assert_array_equal(OrbaxSource(written).read("gate_up"), ARRAYS["gate_up"])


def test_a_disk_that_fails_is_told_with_the_tensor(written, monkeypatch):
    def sendfile(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.sendfile", sendfile)
    with pytest.raises(CheckpointError, match=r"gate_up cannot be read: .*Input/output error"):
        OrbaxSource(written).read("gate_up")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_told_with_the_tensor(directory, keep):
    file = files_of(directory, "gate_up")[3]
    size = file.stat().st_size
    os.truncate(file, keep if isinstance(keep, int) else int(keep * size))
    with pytest.raises(CheckpointError, match=r"gate_up cannot be read: .*; convert the ch"):
        OrbaxSource(directory).read("gate_up")


def test_who_reads_does_not_import_orbax():
    code = "import sys, model.checkpoint.orbax_store; assert 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
