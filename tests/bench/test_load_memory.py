"""The memory of loading is measured while the whole of a checkpoint is loaded."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from bench import load_memory
from bench.load_memory import GIB, LLAMA_405B, Peaks, load, resident_bytes, write_checkpoint
from model.checkpoint import open_checkpoint
from serve.progress import Silent
from sharding.mesh import MeshShape

TINY = LLAMA_405B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 160,
    "num_attention_heads": 16,
}
LARGEST = 2 * 64 * 2 * 96
"""Bytes of gate_up."""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(load_memory, "BLOCK_ROWS", 48)
    write_checkpoint(tmp_path, TINY)
    return tmp_path


def test_the_checkpoint_holds_what_its_configuration_asks_for_block_after_block(checkpoint):
    source = open_checkpoint(checkpoint)
    embedding, gate_up = source.read("embedding"), source.read("layers.1.mlp.gate_up")
    assert embedding.shape == (160, 64)
    bits = embedding.view(np.uint16)
    np.testing.assert_array_equal(bits[:48], bits[48:96])
    np.testing.assert_array_equal(bits[:16], bits[144:])
    first = slice(48 * 64)
    np.testing.assert_array_equal(bits.ravel()[first], gate_up.view(np.uint16).ravel()[first])
    assert len(np.unique(bits)) > 1000


def test_all_of_it_is_loaded_and_a_shard_of_the_largest_weight_counts(checkpoint):
    told = []

    class Told(Silent):
        def update(self, done, total=None, detail="", kept=0):
            told.append((done, detail))

    found = load(checkpoint, MeshShape(tensor=8), Told)
    specs = open_checkpoint(checkpoint).specs
    assert {name for _, name in told} >= set(specs)
    # Windows and frequencies of positions travel with the weights.
    assert found.num_bytes == told[-1][0] > sum(spec.num_bytes for spec in specs.values())
    assert found.in_transit_bytes == LARGEST
    assert 0 <= found.anonymous_bytes < GIB
    assert found.bound_bytes == 2 * LARGEST + load_memory.SPARE_BYTES
    assert found.seconds > 0


def test_a_peak_between_two_calm_times_is_seen(monkeypatch):
    sizes, all_seen = iter([100, 120, 300, 90, 110]), threading.Event()

    def resident_bytes():
        size = next(sizes, None)
        if size is None:
            all_seen.set()
        return {"RssAnon": size or 110, "RssFile": 7}

    monkeypatch.setattr(load_memory, "resident_bytes", resident_bytes)
    monkeypatch.setattr(load_memory, "SAMPLE_S", 0.0)
    with Peaks() as peaks:
        assert all_seen.wait(10)
    assert peaks.beyond == {"RssAnon": 200, "RssFile": 0}


def test_memory_of_our_own_is_anonymous_and_counted():
    before = resident_bytes()
    memory = np.ones(64 << 20, np.uint8)
    assert resident_bytes()["RssAnon"] - before["RssAnon"] > 0.9 * memory.nbytes


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["", "--layers", "1", "--directory", str(tmp_path)])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=15_000_000_000))
    # 405.85e9 numbers of two bytes in 126 layers; 1 of them, embedding and head.
    refused = r"1 layers are 14,78\d,\d{3},\d{3} bytes, .* has 15,000,000,000 free; lower --layers"
    with pytest.raises(SystemExit, match=refused):
        load_memory.main()
    assert not list(tmp_path.iterdir())
