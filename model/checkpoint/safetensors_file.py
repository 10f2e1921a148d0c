"""One safetensors file: eight bytes of header length, a JSON header, then raw tensors end to end.

Parsed here, not by the safetensors package, so that damage is reported by file and tensor, and read
with plain reads, not a memory map: a file cut short while it is served is an error, not a SIGBUS,
and pages of the file never count as memory of this process.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np

from model.checkpoint.contiguous import contiguous
from model.checkpoint.source import CheckpointError, TensorSpec

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies; `start` counts from the beginning of the file."""

    path: Path
    name: str
    spec: TensorSpec
    start: int

    def read(self) -> np.ndarray:
        array = np.empty(self.spec.num_bytes, np.uint8)
        unread = memoryview(array)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while unread:
                count = file.readinto(unread)
                if not count:
                    raise CheckpointError(
                        f"{self.path} ends inside tensor {self.name}: the file was cut short after "
                        "it was opened; copy it again"
                    )
                unread = unread[count:]
        return array.view(self.spec.dtype).reshape(self.spec.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, after checking that they fill it exactly, without overlap.

    Raises CheckpointError naming the file and, where there is one, the tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: no header length")
        if 8 + header_bytes > size:
            raise CheckpointError(
                f"{path} is cut short: its header is {header_bytes} bytes, the file {size}"
            )
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error

    data = 8 + header_bytes
    tensors = {name: _parse(path, name, entry, data) for name, entry in entries.items()}
    position = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.spec.num_bytes)):
        if tensor.start != position:
            problem = (
                "overlaps the tensor before it" if tensor.start < position else "follows a gap"
            )
            raise CheckpointError(f"{path} has a damaged header: tensor {tensor.name} {problem}")
        position += tensor.spec.num_bytes
        if position > size:
            raise CheckpointError(
                f"{path} is cut short: tensor {tensor.name} ends at byte {position}, the file at "
                f"{size}; copy it again"
            )
    if position != size:
        raise CheckpointError(f"{path} has {size - position} bytes after its last tensor")
    return tensors


def _parse(path: Path, name: str, entry: object, data: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(isinstance(size, int) and size >= 0 for size in shape)
        ):
            pass
        case _:
            raise CheckpointError(f"{path} has a damaged header at tensor {name}: {entry}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {dtype}; known are {', '.join(DTYPES)}"
        )
    spec = TensorSpec(tuple(shape), DTYPES[dtype])
    if begin < 0 or end - begin != spec.num_bytes:
        raise CheckpointError(
            f"{path} has a damaged header: tensor {name}, {dtype} {shape}, takes "
            f"{spec.num_bytes} bytes but has offsets {begin} to {end}"
        )
    return StoredTensor(path, name, spec, data + begin)


class SafetensorsWriter:
    """Writes one file whose tensors are known beforehand and arrive in any order."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]):
        # Widest dtype first, as the safetensors library does, so that every tensor is aligned.
        order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for name in order:
            spec = specs[name]
            offsets[name] = end
            end += spec.num_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._specs = specs
        self._unwritten = set(specs)
        self._starts = {name: 8 + len(text) + offset for name, offset in offsets.items()}
        self._file = path.open("wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + end)

    def write(self, name: str, array: np.ndarray) -> None:
        spec = self._specs[name]
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype), (name, array.dtype, spec)
        unwritten = memoryview(contiguous(array).reshape(-1).view(np.uint8))
        position = self._starts[name]
        while unwritten:
            count = os.pwrite(self._file.fileno(), unwritten, position)
            position += count
            unwritten = unwritten[count:]
        self._unwritten.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        assert kind or not self._unwritten, f"not written: {sorted(self._unwritten)}"
