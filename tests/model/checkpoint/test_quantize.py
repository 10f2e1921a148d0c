"""Conversion to 8 bits: what is rounded and by how much, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from model.checkpoint import CheckpointError, open_checkpoint, quantize
from model.checkpoint.convert import convert
from model.checkpoint.quantize import quantize as rounded
from model.families import UnsupportedModel, read_model_config
from model.weights import QUANTIZED_DTYPES, quantized, scale_shape, summed_axes
from tests.model.checkpoint.tiny import LLAMA, MIXTRAL, write_tiny

STEPS = {"int8": 0.5, "fp8": 448 * 2**-4}
"""How far from a number its rounded form may be at most, in scales: half of int8's step; of fp8's
largest numbers, which have 3 bits after the first, half of the last bit."""


@pytest.fixture(scope="module", params=[LLAMA, MIXTRAL], ids=["dense", "experts"])
def original(request, tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("original") / "model", request.param)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def converted(request, original, tmp_path_factory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("converted") / request.param
    convert(original, directory, quantization=request.param)
    return directory, request.param


def test_products_weights_are_rounded_and_all_others_are_as_they_were(original, converted):
    directory, kind = converted
    config = read_model_config(directory)
    assert config == replace(read_model_config(original), quantization=kind)
    before, after = open_checkpoint(original), open_checkpoint(directory)
    for name, spec in before.specs.items():
        if name not in quantized(config):
            assert after.read(name).tobytes() == before.read(name).tobytes(), name
            continue
        numbers, scale = after.read(name), after.read(f"{name}_scale")
        assert (numbers.dtype, scale.dtype) == (QUANTIZED_DTYPES[kind], np.float32)
        assert scale.shape == scale_shape(name, spec.shape)
        wide = np.expand_dims(scale, summed_axes(name))
        away = np.abs(numbers.astype(np.float32) - before.read(name) / wide)
        assert away.max() <= STEPS[kind] * 1.001, name
        largest = np.abs(numbers.astype(np.float32)).max(summed_axes(name))
        assert (largest == quantize.LARGEST[kind]).all(), "a channel's largest is the largest"


def test_what_is_rounded_is_products_within_layers(original):
    names = {name.split(".", 2)[-1] for name in quantized(read_model_config(original))}
    blocks = {"mlp.gate_up", "mlp.down"}, {"moe.gate_up", "moe.down"}
    assert names - {"attention.qkv", "attention.out"} in blocks


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("summed", [(0,), (1,), (0, 1)])
def test_steps_change_nothing(kind, summed, monkeypatch):
    array = np.random.default_rng(0).standard_normal((7, 5, 6)).astype(ml_dtypes.bfloat16)
    whole = rounded(array, summed, kind, "w")
    monkeypatch.setattr(quantize, "STEP", 60)
    for one, other in zip(rounded(array, summed, kind, "w"), whole, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_channel_of_zeros_or_of_hardly_more_stays_finite(kind):
    array = np.array([[0, 1e-45, 1e-38], [0, 0, -1e-38]], np.float32)
    numbers, scale = rounded(array, (0,), kind, "w")
    assert (scale > 0).all()
    assert np.isfinite(numbers.astype(np.float32)).all()
    assert not numbers[:, 0].any()


def test_numbers_that_are_not_finite_are_refused_by_name():
    array = np.ones((4, 3), np.float32)
    array[1, 2] = np.inf
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down holds numbers that are not"):
        rounded(array, (0,), "int8", "layers.3.mlp.down")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "cannot quantize to 'int3'; it can be int8 or fp8"),
        ({"quantization": "int8", "to": "hf"}, "written to orbax only"),
    ],
)
def test_what_cannot_be_made_is_refused(original, tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert(original, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}, {"to": "hf"}])
def test_what_is_quantized_is_not_converted_again(converted, tmp_path, options):
    with pytest.raises(CheckpointError, match="already; convert the checkpoint that it was made"):
        convert(converted[0], tmp_path / "out", **options)


def test_a_dtype_is_that_of_the_others(original, tmp_path):
    convert(original, tmp_path / "out", dtype="bfloat16", quantization="int8")
    specs = open_checkpoint(tmp_path / "out").specs
    found = {spec.dtype.name for spec in specs.values()}
    assert found == {"bfloat16", "int8", "float32"}
    assert read_model_config(tmp_path / "out").dtype == "bfloat16"


@pytest.fixture
def damaged(original, tmp_path) -> Path:
    """A quantized conversion that the test may damage."""
    convert(original, tmp_path / "quantized", quantization="int8")
    return tmp_path / "quantized"


SCALE = "layers.1.attention.out_scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, rf"has no {SCALE} of shape \[32\]"),
        ({"shape": [16]}, rf"has no {SCALE} of shape \[32\]"),
        ({"dtype": "float64"}, rf"has {SCALE} as float64, .* to int8 asks for float32"),
    ],
)
def test_a_scale_that_is_missing_or_another_is_named(damaged, change, message):
    path = damaged / "weft.json"
    manifest = json.loads(path.read_text())
    record = manifest["tensors"].pop(SCALE)
    if change:
        manifest["tensors"][SCALE] = record | change
    path.write_text(json.dumps(manifest))
    (damaged / "weights" / SCALE / "zarr.json").rename(damaged / "weights" / SCALE / "kept")
    if change:
        (damaged / "weights" / SCALE / "kept").rename(damaged / "weights" / SCALE / "zarr.json")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(damaged)


def test_numbers_of_another_quantization_are_named(damaged):
    path = damaged / "config.json"
    path.write_text(path.read_text().replace('"int8"', '"fp8"'))
    with pytest.raises(CheckpointError, match=r"qkv as int8, .* to fp8 asks for float8_e4m3fn"):
        open_checkpoint(damaged)


def test_plain_tensors_under_a_quantized_config_are_refused(original, tmp_path):
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "weft", "weights": "int8"}
    for path in original.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"there is no weft\.json; convert the original"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "found", [{"quant_method": "weft", "weights": "int2"}, {"quant_method": "gptq", "bits": 4}]
)
def test_others_quantizations_are_refused(original, tmp_path, found):
    config = json.loads((original / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
    said = re.escape("null, and what weft convert --quantize writes")
    with pytest.raises(UnsupportedModel, match=said):
        read_model_config(tmp_path)
