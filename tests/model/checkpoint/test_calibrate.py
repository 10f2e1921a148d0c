"""Calibrated conversion of whole models: nearer to the original than rounding to nearest."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import CheckpointError, open_checkpoint
from model.checkpoint.calibrate import Calibrated
from model.checkpoint.convert import convert
from model.checkpoint.quantize import quantize
from model.families import read_model_config
from model.weights import quantized, summed_axes
from tests.model.checkpoint.tiny import LLAMA, MIXTRAL, write_tiny
from tests.model.reference import logits
from tests.serve.harness import DENSE, LATENT, MOE, ArraySource, random_weights

FIRST_TWO = {"dense": DENSE, "experts": MOE, "latent": LATENT}


def sequences(vocab_size: int, num_sequences: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=(num_sequences, 20))


@pytest.fixture(scope="module", params=[LLAMA, MIXTRAL], ids=["dense", "experts"])
def original(request, tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("original") / "model", request.param)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "int8"
    convert(original, directory, quantization="int8", calibration=sequences(40))
    return directory


def test_the_form_on_disk_is_that_of_any_quantized_checkpoint(original, converted, tmp_path):
    convert(original, tmp_path / "plain", quantization="int8")
    assert read_model_config(converted) == read_model_config(tmp_path / "plain")
    ours, plain = open_checkpoint(converted), open_checkpoint(tmp_path / "plain")
    assert ours.specs == plain.specs
    changed = {name for name in plain.specs if (ours.read(name) != plain.read(name)).any()}
    rounded = quantized(read_model_config(original))
    assert changed >= set(rounded), "all are rounded otherwise"
    assert changed <= {*rounded, *(f"{name}_scale" for name in rounded)}


def test_the_manifest_says_on_how_many_tokens(converted, tmp_path):
    assert json.loads((converted / "weft.json").read_text())["calibration_tokens"] == 24 * 20


def test_the_same_tokens_give_the_same_bytes(original, converted, tmp_path):
    convert(original, tmp_path / "again", quantization="int8", calibration=sequences(40))
    again = (tmp_path / "again" / "weft.json").read_bytes()
    assert again == (converted / "weft.json").read_bytes(), "digests of all tensors are in it"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("model", FIRST_TWO)
def test_logits_of_other_tokens_are_nearer_than_rounded_to_nearest(model, kind):
    config = replace(FIRST_TWO[model], layers=FIRST_TWO[model].layers[:2])
    arrays = random_weights(config)
    calibrated = Calibrated(ArraySource(arrays), config, kind, sequences(config.vocab_size, 100))
    ours, plain = dict(arrays), dict(arrays)
    for name in quantized(config):
        for found, (numbers, scales) in (
            (ours, calibrated(name, (slice(None),))),
            (plain, quantize(arrays[name], summed_axes(name), kind, name)),
        ):
            wide = np.expand_dims(scales, summed_axes(name))
            found[name] = numbers.astype(np.float32) * wide

    def error(rounded: dict[str, np.ndarray]) -> float:
        others = sequences(config.vocab_size, 3, seed=1).tolist()
        away = [logits(config, rounded, some) - logits(config, arrays, some) for some in others]
        return float(np.linalg.norm(away))

    assert error(ours) < 0.9 * error(plain)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((0, 20), int), "no tokens to calibrate on; give a sequence"),
        (np.array([[1, 40]]), "is 40, and the vocabulary is 0 to 39; give tokens of this model"),
        (np.array([[1, -1]]), "is -1, and the vocabulary"),
    ],
)
def test_tokens_that_cannot_be_are_refused(original, tmp_path, tokens, message):
    with pytest.raises(CheckpointError, match=message):
        convert(original, tmp_path / "out", quantization="int8", calibration=tokens)
    assert not (tmp_path / "out").exists()


def test_calibration_without_quantization_is_refused(original, tmp_path):
    with pytest.raises(CheckpointError, match="give one, int8 or fp8"):
        convert(original, tmp_path / "out", calibration=sequences(40))
