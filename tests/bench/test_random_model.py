"""Random models for benches."""

import pytest

import bench.random_model
from bench.offline import RANDOM_MODEL, describe
from bench.random_model import random_model

SMALL = {"hidden": 64, "mlp": 128, "layers": 1, "heads": 4, "kv-heads": 2, "vocab": 100}


def test_without_a_model_a_checkout_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.random_model, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="name a model directory, or run from a checkout"):
        random_model(SMALL, tmp_path, lambda line: None)


def test_it_is_the_one_described_and_written_once(tmp_path):
    lines: list[str] = []
    options = RANDOM_MODEL | SMALL
    first, second = (random_model(options, tmp_path, lines.append) for _ in range(2))
    assert first == second
    assert len(lines) == 1
    assert "1 layers, 64 wide, feed-forward 128, 4/2 heads" in describe(first)
