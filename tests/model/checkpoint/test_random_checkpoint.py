import numpy as np
import pytest

from model.checkpoint import open_checkpoint
from model.families import read_model_config
from tests.model.checkpoint.tiny import assert_same_tensors, load_tensors
from tools import random_checkpoint

SIZES = {"hidden": 64, "mlp": 96, "layers": 2, "heads": 4, "kv-heads": 2, "vocab": 128}


def make(monkeypatch, directory, *options: str):
    sizes = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    monkeypatch.setattr("sys.argv", ["random_checkpoint", str(directory), *sizes, *options])
    random_checkpoint.main()
    return directory


@pytest.mark.parametrize("arch", random_checkpoint.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_opens(tmp_path, monkeypatch, arch, dtype):
    directory = make(monkeypatch, tmp_path / "m", "--arch", arch, "--dtype", dtype)
    assert read_model_config(directory).dtype == dtype
    source = open_checkpoint(directory)
    assert {spec.dtype.name for spec in source.specs.values()} == {dtype}
    head = source.read("head").astype(np.float32)
    assert head.std() == pytest.approx(64**-0.5, rel=0.05)


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    first = load_tensors(make(monkeypatch, tmp_path / "a", "--seed", "1"))
    assert_same_tensors(load_tensors(make(monkeypatch, tmp_path / "b", "--seed", "1")), first)
    other = load_tensors(make(monkeypatch, tmp_path / "c", "--seed", "2"))
    assert not np.array_equal(other["lm_head.weight"], first["lm_head.weight"])


def test_a_tied_model_has_no_head(tmp_path, monkeypatch):
    assert "head" not in open_checkpoint(make(monkeypatch, tmp_path / "m", "--tie")).specs
