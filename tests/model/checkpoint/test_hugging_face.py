import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.checkpoint.hugging_face import (
    HuggingFaceSource,
    HuggingFaceWriter,
    tensor_shapes,
)
from model.checkpoint.source import CheckpointError, TensorSpec
from model.families import read_model_config, weights
from tests.model.checkpoint.tiny import LLAMA, MIXTRAL, load_tensors, save_tensors, write_tiny

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path):
    return write_tiny(tmp_path / "llama")


def open_source(directory, **options) -> HuggingFaceSource:
    return HuggingFaceSource(directory, weights(read_model_config(directory)), **options)


def shard(directory, num_files: int = 2) -> None:
    """Split model.safetensors as save_pretrained would."""
    tensors = load_tensors(directory)
    (directory / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    files = {tensor: names[i % num_files] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: a for t, a in tensors.items() if files[t] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_what_packing_the_librarys_tensors_gives(tmp_path, config, sharded):
    directory = write_tiny(tmp_path / "model", config)
    tensors = load_tensors(directory)
    if sharded:
        shard(directory)
    source = open_source(directory)
    for weight in weights(read_model_config(directory)):
        packed = [weight.pack([tensors[name] for name in part]) for part in weight.parts]
        expected = np.stack(packed) if len(packed) > 1 else packed[0]
        found = source.read(weight.name)
        assert source.specs[weight.name] == TensorSpec(found.shape, found.dtype)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_region_is_that_region_of_the_whole(tmp_path, cache_bytes):
    source = open_source(write_tiny(tmp_path / "model", MIXTRAL), cache_bytes=cache_bytes)
    for name in source.specs:
        whole = source.read(name)
        last = (slice(None),) * (whole.ndim - 1)
        half = slice(whole.shape[-1] // 2, None)
        np.testing.assert_array_equal(source.read(name, (*last, half)), whole[..., half])
        np.testing.assert_array_equal(source.read(name, (slice(1, 3),)), whole[1:3])
        np.testing.assert_array_equal(source.read(name, (slice(2, 2),)), whole[2:2])


def test_regions_of_a_weight_cost_one_packing(llama, monkeypatch):
    source = open_source(llama)
    reads = []
    stored = type(source._tensors[Q])
    read = stored.read
    monkeypatch.setattr(stored, "read", lambda tensor: (reads.append(tensor.name), read(tensor))[1])
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(
            lambda i: source.read("head", (slice(None), slice(5 * i, 5 * i + 5))), range(8)
        )
        found = np.concatenate(list(parts), axis=1)
    assert reads == ["lm_head.weight"]
    np.testing.assert_array_equal(found, source.read("head"))


def test_tensor_shapes_are_those_of_the_files(tmp_path):
    directory = write_tiny(tmp_path / "model", MIXTRAL)
    expected = {name: array.shape for name, array in load_tensors(directory).items()}
    assert tensor_shapes(weights(read_model_config(directory))) == expected


def test_a_missing_tensor_is_named_with_the_file_searched(llama):
    tensors = load_tensors(llama)
    del tensors[Q]
    save_tensors(llama, tensors)
    with pytest.raises(
        CheckpointError, match=f"model.safetensors lacks tensor {Q}; is config.json"
    ):
        open_source(llama)


def test_missing_tensors_in_number_are_counted(llama):
    save_tensors(llama, {"model.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(CheckpointError, match=r"lacks tensors .*, .*, .* and \d+ more"):
        open_source(llama)


def test_a_wrong_shape_is_refused_with_both_shapes(llama):
    tensors = load_tensors(llama)
    tensors[Q] = tensors[Q][:16].copy()
    save_tensors(llama, tensors)
    with pytest.raises(CheckpointError, match=rf"{Q} has shape \[16, 32\].*asks for \[32, 32\]"):
        open_source(llama)


def test_unexpected_tensors_are_refused_unless_ignorable(llama):
    save_tensors(llama, load_tensors(llama) | {"adapter.weight": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"holds tensor adapter\.weight, of which"):
        open_source(llama)
    open_source(llama, ignorable=lambda name: name == "adapter.weight")


def test_one_weight_of_two_dtypes_is_refused(llama):
    tensors = load_tensors(llama)
    tensors[Q] = tensors[Q].astype(np.float16)
    save_tensors(llama, tensors)
    with pytest.raises(CheckpointError, match=rf"layers.0.attention.qkv differ .* {Q} is float16"):
        open_source(llama)


def test_a_missing_shard_is_named(llama):
    shard(llama)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_source(llama)


def test_a_shard_without_its_tensor_is_named(llama):
    shard(llama)
    path = llama / "model-00001-of-00002.safetensors"
    name, *_ = tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"00001-of-00002.safetensors has no tensor {name}"):
        open_source(llama)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": []}}'])
def test_a_damaged_index_is_refused(llama, text):
    shard(llama)
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        open_source(llama)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd"])
def test_an_index_reaches_no_other_directory(llama, name):
    shard(llama)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is not a file beside it"):
        open_source(llama)


def test_large_checkpoints_are_split_with_an_index(tmp_path):
    arrays = {f"t{i}": np.full((i + 1, 4), i, np.float32) for i in range(5)}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    with HuggingFaceWriter(tmp_path, specs, max_file_bytes=50) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert index["weight_map"] == {
        "t0": "model-00001-of-00004.safetensors",
        "t1": "model-00001-of-00004.safetensors",
        "t2": "model-00002-of-00004.safetensors",
        "t3": "model-00003-of-00004.safetensors",
        "t4": "model-00004-of-00004.safetensors",
    }
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], arrays[name])
