import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest

from model.checkpoint import CheckpointError, open_checkpoint
from model.checkpoint.convert import convert
from model.checkpoint.orbax_store import FILE_BYTES, choose_layout
from model.checkpoint.safetensors_file import SafetensorsWriter
from model.checkpoint.source import TensorSpec
from model.families import UnsupportedModel
from tests.assets import ASSETS, needs_assets
from tests.model.checkpoint.tiny import (
    LLAMA,
    MIXTRAL,
    assert_same_tensors,
    load_tensors,
    save_tensors,
    write_tiny,
)


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_tiny(tmp_path / "llama")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    convert(write_tiny(directory / "llama"), directory / "orbax")
    return directory / "orbax"


@pytest.fixture
def orbax(converted, tmp_path) -> Path:
    """A converted directory that the test may damage."""
    return shutil.copytree(converted, tmp_path / "orbax")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def leaves(tree: object) -> dict[str, object]:
    return {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@needs_assets
@pytest.mark.parametrize(
    "family",
    ["llama", "llama_bf16", "mixtral", "qwen3_moe_sharded", "gemma2", "phi3", "gpt_oss", "olmo2"],
)
def test_a_family_survives_orbax_bit_for_bit(tmp_path, family):
    original = ASSETS / "families" / family
    convert(original, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="hf")
    assert_same_tensors(load_tensors(tmp_path / "back"), load_tensors(original))
    for path in original.iterdir():
        if ".safetensors" not in path.name:
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_both_forms_read_the_same(tmp_path):
    hugging_face = open_checkpoint(write_tiny(tmp_path / "hf", MIXTRAL))
    convert(tmp_path / "hf", tmp_path / "orbax")
    orbax = open_checkpoint(tmp_path / "orbax")
    assert dict(orbax.specs) == dict(hugging_face.specs)
    for name, spec in orbax.specs.items():
        whole = orbax.read(name)
        assert whole.tobytes() == hugging_face.read(name).tobytes()
        index = tuple(slice(size // 3, size // 3 + size // 2) for size in spec.shape)
        np.testing.assert_array_equal(orbax.read(name, index), whole[index])


def test_regions_are_read_by_many_threads_at_once(orbax):
    source = open_checkpoint(orbax)
    whole = source.read("head")
    regions = [(slice(None), slice(5 * i, 5 * i + 5)) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda region: source.read("head", region), regions))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_plain_orbax_restores_what_was_converted(orbax):
    source = open_checkpoint(orbax)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = leaves(checkpointer.restore(orbax / "weights"))
    assert restored.keys() == source.specs.keys()
    for name, array in restored.items():
        np.testing.assert_array_equal(array, source.read(name))


def test_the_next_orbax_restores_it_too(orbax):
    source = open_checkpoint(orbax)
    restored = leaves(ocp_v1.load(orbax / "weights"))
    assert restored.keys() == source.specs.keys()
    for name, array in restored.items():
        np.testing.assert_array_equal(array, source.read(name))


def test_plain_orbax_restores_straight_onto_a_mesh(orbax):
    source = open_checkpoint(orbax)
    mesh = jax.make_mesh((len(jax.devices()),), ("tensor",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = {"embedding": jax.ShapeDtypeStruct((40, 32), np.float32, sharding=sharding)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            orbax / "weights",
            args=ocp.args.PyTreeRestore(
                target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    assert restored["embedding"].sharding == sharding
    np.testing.assert_array_equal(restored["embedding"], source.read("embedding"))


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_dtype_changes_the_weights_and_what_config_says(llama, tmp_path, to):
    convert(llama, tmp_path / "new", dtype="bfloat16", to=to)
    source, converted = open_checkpoint(llama), open_checkpoint(tmp_path / "new")
    for name, spec in converted.specs.items():
        assert spec.dtype.name == "bfloat16"
        np.testing.assert_array_equal(converted.read(name), source.read(name).astype(spec.dtype))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config == LLAMA | {"torch_dtype": "bfloat16"}


@needs_assets
def test_a_bias_that_chooses_experts_keeps_its_dtype(tmp_path):
    source = ASSETS / "families" / "deepseek_v3"
    convert(source, tmp_path / "new", dtype="bfloat16")
    specs = open_checkpoint(tmp_path / "new").specs
    kept = {name for name, spec in specs.items() if spec.dtype.name != "bfloat16"}
    assert kept == {f"layers.{i}.moe.selection_bias" for i in (1, 2)}
    assert specs["layers.1.moe.selection_bias"].dtype == np.float32


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "float16"}),
        (
            {"dtype": "float32", "torch_dtype": "float32"},
            {"dtype": "float16", "torch_dtype": "float16"},
        ),
    ],
)
def test_config_keeps_the_keys_it_has_for_its_dtype(llama, tmp_path, keys, expected):
    config = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    (llama / "config.json").write_text(json.dumps(config | keys))
    convert(llama, tmp_path / "new", dtype="float16", to="hf")
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config | expected


def test_a_dtype_that_is_already_so_leaves_config_byte_for_byte(llama, tmp_path):
    (llama / "config.json").write_text(json.dumps(LLAMA))
    convert(llama, tmp_path / "new", dtype="float32", to="hf")
    assert (tmp_path / "new" / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert_same_tensors(load_tensors(tmp_path / "new"), load_tensors(llama))


def test_a_value_too_large_for_the_dtype_is_refused_by_name(llama, tmp_path):
    tensors = load_tensors(llama)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e6
    save_tensors(llama, tensors)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down holds 1e\+06, beyond float16"):
        convert(llama, tmp_path / "new", dtype="float16")
    assert names(tmp_path) == ["llama"]


def test_what_lies_beside_the_weights_is_copied(llama, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE"):
        (llama / name).write_bytes(name.encode())
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    for name in ("pytorch_model.bin", "consolidated.pth", ".gitattributes"):
        (llama / name).write_bytes(b"")
    convert(llama, tmp_path / "new")
    assert names(tmp_path / "new") == [
        "LICENSE",
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "weft.json",
        "weights",
    ]
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == b"tokenizer.model"
    convert(tmp_path / "new", tmp_path / "back", to="hf")
    assert "weft.json" not in names(tmp_path / "back")


def test_progress_counts_every_byte_written_and_checked(llama, tmp_path):
    calls: list[tuple[int, int, str]] = []
    convert(llama, tmp_path / "new", progress=lambda *call: calls.append(call))
    num_bytes = sum(array.nbytes for array in load_tensors(llama).values())
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][:2] == (2 * num_bytes, 2 * num_bytes)
    assert {call[2] for call in calls} == open_checkpoint(llama).specs.keys()


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_an_interrupted_conversion_leaves_nothing(llama, tmp_path, to):
    def interrupt(done: int, total: int, name: str) -> None:
        if done > total // 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "new", to=to, progress=interrupt)
    assert names(tmp_path) == ["llama"]
    convert(llama, tmp_path / "new", to=to)


def test_a_killed_conversion_leaves_no_result_and_the_next_one_cleans_up(llama, tmp_path):
    code = f"""
import time
from model.checkpoint.convert import convert

def stop(done, total, name):
    if done > total // 4:
        print("halfway", flush=True)
        time.sleep(600)

convert({str(llama)!r}, {str(tmp_path / "new")!r}, progress=stop)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"halfway\n"
        process.kill()
    left = [name for name in names(tmp_path) if name != "llama"]
    assert len(left) == 1
    assert left[0].startswith("new.incomplete-")
    convert(llama, tmp_path / "new")
    assert names(tmp_path) == ["llama", "new"]


def test_what_reads_back_otherwise_is_never_published(llama, tmp_path, monkeypatch):
    write = SafetensorsWriter.write

    def flip(writer, name, array):
        write(writer, name, array if "down_proj" not in name else -array)

    monkeypatch.setattr(SafetensorsWriter, "write", flip)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.down reads back .* other than"):
        convert(llama, tmp_path / "new", to="hf")
    assert names(tmp_path) == ["llama"]


def test_a_full_disk_is_told_beforehand(llama, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(9, 8, 1))
    with pytest.raises(CheckpointError, match=r"new needs [\d,]+ bytes, .* has 1 free; make room"):
        convert(llama, tmp_path / "new")
    assert names(tmp_path) == ["llama"]


def test_an_existing_destination_is_refused_before_any_work(llama, tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match="new exists; remove it"):
        convert(llama, tmp_path / "new")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype is 'int4'; it can be float32, bfloat16, float16"),
        ({"to": "gguf"}, "cannot convert to 'gguf'; it can be orbax or hf"),
    ],
)
def test_options_that_do_not_exist_are_refused(llama, tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert(llama, tmp_path / "new", **options)


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize(
    ("config", "name", "share"),
    [(LLAMA, "layers.0.mlp.gate_up", 1), (MIXTRAL, "layers.0.moe.gate_up", 1 / 4)],
)
def test_a_conversion_holds_two_of_the_largest_block(tmp_path, config, name, share, to):
    wide = write_tiny(tmp_path / "wide", config, hidden_size=256, intermediate_size=2048)
    if to == "hf":
        convert(wide, tmp_path / "orbax")
        wide = tmp_path / "orbax"
    largest = open_checkpoint(wide).specs[name].num_bytes * share
    tracemalloc.start()
    convert(wide, tmp_path / "new", to=to)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Beside arrays, what Python and Orbax allocate for a conversion is traced, under 1 MB of it.
    assert peak < 2 * largest + 1_000_000


@pytest.mark.parametrize(
    ("path", "message"), [("absent", "absent does not exist"), ("file", "file is a file")]
)
def test_a_path_that_is_no_directory_is_refused(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / path)


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "consolidated.safetensors").touch()
    looked_for = "neither model.safetensors nor model.safetensors.index.json, nor the weft.json"
    with pytest.raises(CheckpointError, match=f"{looked_for}.*it has consolidated.safetensors"):
        open_checkpoint(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"can run code when read; .*save_pretrained"):
        open_checkpoint(tmp_path)


def test_weights_without_config_are_refused(llama):
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(llama)


def test_an_unsupported_model_is_refused_as_such(llama, tmp_path):
    (llama / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["OtherModel"]}))
    with pytest.raises(UnsupportedModel, match="OtherModel"):
        convert(llama, tmp_path / "new")


def test_a_flipped_bit_is_found_by_whoever_reads_it(orbax):
    chunk = orbax / "weights" / "layers.0.mlp.down" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    source = open_checkpoint(orbax)
    with pytest.raises(
        CheckpointError, match=r"layers.0.mlp.down cannot be read: .*Digest mismatch"
    ):
        source.read("layers.0.mlp.down")
    source.read("layers.1.mlp.down")


def test_a_missing_chunk_is_an_error_not_zeros(orbax):
    (orbax / "weights" / "final_norm" / "c" / "0").unlink()
    with pytest.raises(CheckpointError, match="final_norm cannot be read"):
        open_checkpoint(orbax).read("final_norm")


def test_a_missing_tensor_is_named_at_once(orbax):
    (orbax / "weights" / "final_norm" / "zarr.json").unlink()
    with pytest.raises(CheckpointError, match=r"weights lacks tensor final_norm"):
        open_checkpoint(orbax)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"tensors": {"head": {}}}, r"tensors\.head\.shape: Field required"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_a_manifest_of_another_version_is_refused(orbax, change, message):
    manifest = json.loads((orbax / "weft.json").read_text())
    (orbax / "weft.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(orbax)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 41}, r"has no embedding of shape \[41, 32\]"),
        ({"num_hidden_layers": 1}, "lists layers.1.*, of which config.json says nothing"),
    ],
)
def test_a_config_that_was_edited_after_conversion_is_refused(orbax, change, message):
    (orbax / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(orbax)


@pytest.mark.parametrize(
    ("name", "shape", "axis", "share"),
    [
        ("embedding", (128_256, 4096), 0, 8),
        ("head", (4096, 128_256), 1, 8),
        ("layers.0.attention.qkv", (4096, 8, 6, 128), 1, 8),
        ("layers.0.attention.out", (8, 4, 128, 4096), 0, 8),
        ("layers.0.mlp.gate_up", (8192, 2, 28_672), 2, 8),
        ("layers.0.mlp.down", (28_672, 8192), 0, 8),
        ("layers.0.moe.gate_up", (8, 6144, 2, 16_384), 3, 8),
        ("layers.0.moe.down", (8, 16_384, 6144), 1, 8),
    ],
)
def test_a_devices_share_is_read_in_few_chunks_that_hold_little_else(name, shape, axis, share):
    spec = TensorSpec(shape, np.dtype(np.float16))
    block_rows = 1 if "moe" in name else shape[0]
    layout = choose_layout(name, spec, block_rows)
    file_bytes = np.prod(layout.file_shape) * 2
    assert file_bytes <= FILE_BYTES
    assert 1 << 20 <= np.prod(layout.chunk_shape) * 2 <= 16 << 20
    assert all(f % c == 0 for f, c in zip(layout.file_shape, layout.chunk_shape, strict=True))
    # Chunks that the second of `share` devices touches along the axis that is cut.
    width, chunk = shape[axis] // share, layout.chunk_shape[axis]
    touched = -(-2 * width // chunk) * chunk - width // chunk * chunk
    assert touched <= 1.5 * width
