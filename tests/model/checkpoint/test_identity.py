"""Which weights a directory holds."""

import os
import shutil

import pytest

from model.checkpoint.identity import BLOCK_BYTES, identity


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    (directory / "weights").mkdir(parents=True)
    (directory / "config.json").write_text('{"layers": 2}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(os.urandom(5 * BLOCK_BYTES))
    (directory / "weights" / "part.json").write_text("a chunk")
    return directory


def test_a_copy_is_the_same_model(model, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy, copy_function=shutil.copyfile)
    os.utime(copy / "model.safetensors", (1, 1))
    assert identity(copy) == identity(model)
    assert len(identity(model)) == 16


def test_what_says_how_to_use_it_does_not_count(model):
    before = identity(model)
    (model / "tokenizer.json").write_text('{"more": 1}')
    (model / "README.md").write_text("read me")
    (model / ".cache").mkdir()
    (model / ".cache" / "model.metadata").write_text("downloaded today")
    assert identity(model) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "weights/part.json"])
def test_another_configuration_or_weight_is_another_model(model, name):
    before = identity(model)
    content = bytearray((model / name).read_bytes())
    content[-1] ^= 1
    (model / name).write_bytes(content)
    assert identity(model) != before


def test_large_files_are_told_apart_by_samples(model):
    large = model / "model.safetensors"
    size = 1000 * BLOCK_BYTES
    found = set()
    for seed in (1, 2):
        large.write_bytes(bytes([seed]) * size)
        found.add(identity(model))
    large.write_bytes(bytes([2]) * (size + 1))
    assert identity(model) not in found
    assert len(found) == 2
