import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.checkpoint.safetensors_file import DTYPES, SafetensorsWriter, read_header
from model.checkpoint.source import CheckpointError, TensorSpec

DTYPES_OF_WEIGHTS = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


def bits(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Any bits, NaNs among them."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, count, np.uint8).view(dtype).reshape(shape)


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, *shape: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_a_file_of_the_safetensors_library_reads_as_it_was(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    save_file({"a": array, "b": array[:1]}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    assert {name: stored.spec.shape for name, stored in tensors.items()} == {
        "a": (3, 4),
        "b": (1, 4),
    }
    assert tensors["a"].read().dtype == dtype
    assert tensors["a"].read().tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES_OF_WEIGHTS)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, dtype):
    array = bits((5, 3), dtype)
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {"a": TensorSpec((5, 3), np.dtype(dtype))}) as writer:
        writer.write("a", array)
    assert read_header(path)["a"].read().tobytes() == array.tobytes()


def test_the_safetensors_library_reads_what_is_written_in_any_order(tmp_path):
    tensors = {
        "half": np.arange(3, dtype=np.float16),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "single": np.arange(4, dtype=np.float32),
    }
    path = tmp_path / "x.safetensors"
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
    with SafetensorsWriter(path, specs) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    assert all(t.start % t.spec.dtype.itemsize == 0 for t in read_header(path).values())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "damaged header"),
        ([], b"", "damaged header"),
        ({"a": 1}, b"", "damaged header at tensor a"),
        ({"a": entry(0, 4, 2, 2)}, b"123", "cut short: tensor a ends at byte"),
        ({"a": entry(0, 4, 2, 2)}, b"12345", "1 bytes after its last tensor"),
        ({"a": entry(0, 3, 2, 2)}, b"123", r"tensor a, U8 \[2, 2\], takes 4 bytes but"),
        ({"a": entry(0, 2, 2), "b": entry(1, 3, 2)}, b"123", "tensor b overlaps"),
        ({"a": entry(0, 2, 2), "b": entry(3, 5, 2)}, b"12345", "tensor b follows a gap"),
        ({"a": entry(0, 4, -2, -2)}, b"1234", "damaged header at tensor a"),
        ({"a": entry(0, 1, 1, dtype="F4")}, b"1", "tensor a is stored as F4; known are BOOL"),
    ],
)
def test_damage_is_refused_by_file_and_tensor(tmp_path, header, data, message):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header length"),
        (b"PK\x03\x04 a zip file of some pickles", "no header length"),
        (struct.pack("<Q", 100) + b"{}", "cut short: its header is 100 bytes"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_file_cut_after_it_was_opened_is_an_error(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(0, 4, 4)}, b"1234")
    tensor = read_header(path)["a"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ends inside tensor a"):
        tensor.read()


def test_a_writer_that_is_left_with_a_tensor_missing_says_so(tmp_path):
    spec = TensorSpec((1,), DTYPES["F32"])
    with (
        pytest.raises(AssertionError, match=r"not written: \['b'\]"),
        SafetensorsWriter(tmp_path / "x.safetensors", {"a": spec, "b": spec}) as writer,
    ):
        writer.write("a", np.ones(1, np.float32))
