"""Conversion between Hugging Face and Orbax checkpoints: streamed, verified, all or nothing.

It does not know the command line that asks for it or how progress is shown.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from model.checkpoint import manifest, open_checkpoint
from model.checkpoint.cast import DTYPES, cast, target_dtype
from model.checkpoint.contiguous import contiguous
from model.checkpoint.hugging_face import HuggingFaceWriter, tensor_shapes
from model.checkpoint.manifest import Manifest, TensorRecord
from model.checkpoint.quantize import quantize
from model.checkpoint.source import Block, CheckpointError, Index, TensorSource, TensorSpec
from model.checkpoint.staging import staged
from model.config import ModelConfig, Quantization
from model.families import declare_quantization, read_model_config, weights
from model.weights import (
    QUANTIZED_DTYPES,
    Weight,
    quantized,
    scale_shape,
    stays_float32,
    summed_axes,
)

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the tensor at hand; every byte is counted twice, once
when it is written and once when it is read back and compared."""

Round = Callable[[str, Index], tuple[np.ndarray, np.ndarray]]
"""Of rows of a weight, numbers and scales; weights are asked for in their order."""

# Everything beside the weights is copied, except weights in formats of other programs.
NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
COPIED_DIRECTORIES = ("additional_chat_templates",)
SPARE_BYTES = 64 << 20  # metadata, directories, block rounding


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    calibration: np.ndarray | None = None,
    to: Literal["orbax", "hf"] = "orbax",
    progress: Progress = lambda done, total, name: None,
) -> None:
    """Write the checkpoint `source` as the new directory `destination`, with what lies beside it.

    Holds at most two of the largest weight in memory beside the program itself. The result was read
    back and compared, and is on disk, before it appears under its name. `dtype` (float32, bfloat16,
    float16) changes the weights of floating type and what config.json says of them; `quantization`
    those of products, which `model/weights.py` lists. `calibration`, token ids of sequences of one
    length, has them rounded for what the model computes of these: it then runs on the CPU, and more
    is in memory (`model/checkpoint/calibrate.py`).
    Raises CheckpointError, or what else went wrong, having left nothing at `destination`.
    """
    source, destination = Path(source), Path(destination)
    if calibration is not None and quantization is None:
        raise CheckpointError("calibration is of a quantization; give one, int8 or fp8")
    stream, beside = _prepare(source, destination, dtype, quantization, to)
    stream.progress = progress
    if quantization:
        stream.round = _rounding(stream.source, stream.config, quantization, calibration)

    with staged(destination) as directory:
        for path in beside:
            target = directory / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        if dtype is not None:
            _declare_dtype(directory / "config.json", dtype)
        if quantization is not None:
            _declare_quantization(directory / "config.json", quantization)
        if to == "orbax":
            _write_orbax(directory, stream)
            records = {
                name: TensorRecord(
                    shape=spec.shape, dtype=spec.dtype.name, sha256=stream.digests[name]
                )
                for name, spec in stream.specs.items()
            }
            Manifest(
                architecture=stream.config.architecture,
                tensors=records,
                calibration_tokens=None if calibration is None else calibration.size,
            ).save(directory)
        else:
            _write_hugging_face(directory, stream)
        _verify(directory, stream)


def check(
    source: Path | str,
    destination: Path | str,
    *,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    to: Literal["orbax", "hf"] = "orbax",
) -> None:
    """Raises what `convert` would before it reads weights."""
    _prepare(Path(source), Path(destination), dtype, quantization, to)


def _prepare(
    source: Path, destination: Path, dtype: str | None, quantization: Quantization | None, to: str
) -> tuple["_Stream", list[Path]]:
    """The weights as they will be, and the files beside them. Raises CheckpointError."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    if to not in ("orbax", "hf"):
        raise CheckpointError(f"cannot convert to {to!r}; it can be orbax or hf")
    if quantization is not None and quantization not in QUANTIZED_DTYPES:
        raise CheckpointError(
            f"cannot quantize to {quantization!r}; it can be {' or '.join(QUANTIZED_DTYPES)}"
        )
    if quantization and to == "hf":
        raise CheckpointError("quantized weights are written to orbax only; leave out --to hf")
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists; remove it or choose another destination")
    tensors = open_checkpoint(source, cache_bytes=0)
    config = read_model_config(source)
    if config.quantization:
        raise CheckpointError(
            f"{source} is quantized to {config.quantization} already; convert the checkpoint that "
            "it was made of"
        )
    stream = _Stream(tensors, config, DTYPES[dtype] if dtype else None, quantization)
    beside = _files_beside(source)
    _check_space(destination, stream.num_bytes + sum(path.stat().st_size for path in beside))
    return stream, beside


class _Stream:
    """The source's weights block by block, in their new form, each hashed on the way."""

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        dtype: np.dtype | None,
        quantization: Quantization | None,
    ):
        self.source, self.config = source, config
        self.round: Round | None = None
        """Of weights that are quantized."""
        self.progress: Progress = lambda done, total, name: None
        self.weights = weights(config)
        self.specs = {
            weight.name: TensorSpec(
                weight.shape,
                target_dtype(
                    source.specs[weight.name].dtype, None if stays_float32(weight.name) else dtype
                ),
            )
            for weight in self.weights
        }
        self._quantized = quantized(config) if quantization else {}
        for name, shape in self._quantized.items():
            assert quantization, "nothing is quantized without"
            self.specs[name] = TensorSpec(shape, QUANTIZED_DTYPES[quantization])
            self.specs[f"{name}_scale"] = TensorSpec(scale_shape(name, shape), np.dtype(np.float32))
        self.num_parts = {
            name: len(weight.parts) for weight in self.weights for name in self.names(weight)
        }
        self.num_bytes = sum(spec.num_bytes for spec in self.specs.values())
        self.digests: dict[str, str] = {}
        self._done_bytes = 0

    def blocks(self) -> Iterator[Block]:
        """Whoever takes a block must drop it before asking for the next, to hold but one."""
        with ThreadPoolExecutor(max_workers=1) as hasher:
            for weight in self.weights:
                digests = {name: hashlib.sha256() for name in self.names(weight)}
                for part in range(len(weight.parts)):
                    for name, array in zip(digests, self._made(weight, part), strict=True):
                        # Hashing lets other threads run: it costs no time beside the writing.
                        hashing = hasher.submit(digests[name].update, _bytes(array))
                        yield Block(name, part, array)
                        hashing.result()
                        self.report(array.nbytes, name)
                        del array, hashing  # as the taker does
                self.digests |= {name: digest.hexdigest() for name, digest in digests.items()}

    def names(self, weight: Weight) -> tuple[str, ...]:
        """What is made of a weight: itself and, of one that is quantized, its scale."""
        name = weight.name
        return (name, f"{name}_scale") if name in self._quantized else (name,)

    def _made(self, weight: Weight, part: int) -> Iterator[np.ndarray]:
        """One part of each."""
        name = weight.name
        rows = _rows(len(weight.parts), part)
        if name in self._quantized:
            assert self.round is not None, "it is given before blocks are"
            yield from self.round(name, rows)
        else:
            array = self.source.read(name, rows)
            yield contiguous(cast(array, self.specs[name].dtype, name))

    def report(self, num_bytes: int, name: str) -> None:
        self._done_bytes += num_bytes
        self.progress(self._done_bytes, 2 * self.num_bytes, name)


def _rounding(
    source: TensorSource,
    config: ModelConfig,
    quantization: Quantization,
    calibration: np.ndarray | None,
) -> Round:
    if calibration is not None:
        # It runs the model: only who asks for it waits for its imports.
        from model.checkpoint.calibrate import Calibrated

        return Calibrated(source, config, quantization, calibration)
    return lambda name, rows: quantize(
        source.read(name, rows), summed_axes(name), quantization, name
    )


def _rows(num_parts: int, part: int) -> tuple[slice, ...]:
    return (slice(part, part + 1),) if num_parts > 1 else ()


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _write_orbax(directory: Path, stream: _Stream) -> None:
    from model.checkpoint.orbax_store import WEIGHTS, write_orbax

    block_rows = {
        name: 1 if stream.num_parts[name] > 1 else spec.shape[0]
        for name, spec in stream.specs.items()
    }
    write_orbax(directory / WEIGHTS, stream.specs, block_rows, stream.blocks())


def _write_hugging_face(directory: Path, stream: _Stream) -> None:
    shapes = tensor_shapes(stream.weights)
    by_name = {weight.name: weight for weight in stream.weights}
    specs = {
        name: TensorSpec(shapes[name], stream.specs[weight.name].dtype)
        for weight in stream.weights
        for part in weight.parts
        for name in part
    }
    with HuggingFaceWriter(directory, specs) as writer:
        for block in stream.blocks():
            weight = by_name[block.name]
            tensors = weight.unpack(block.array[0] if len(weight.parts) > 1 else block.array)
            for name, tensor in zip(weight.parts[block.start], tensors, strict=True):
                writer.write(name, tensor)
            del block, tensors, tensor  # or they would stay in memory while the next is made


def _verify(directory: Path, stream: _Stream) -> None:
    written = open_checkpoint(directory, cache_bytes=0)
    for name, num_parts in stream.num_parts.items():
        digest = hashlib.sha256()
        for part in range(num_parts):
            block = contiguous(written.read(name, _rows(num_parts, part)))
            digest.update(_bytes(block))
            stream.report(block.nbytes, name)
            del block
        if digest.hexdigest() != stream.digests[name]:
            raise CheckpointError(
                f"{name} reads back from {directory} other than it was written: a fault of "
                "Weft, or of this machine's memory or disk; convert again and report it if it stays"
            )


def _files_beside(source: Path) -> list[Path]:
    """What is copied: configuration, tokenizer, templates, licences; no weights or hidden files."""
    directories = [source, *(source / name for name in COPIED_DIRECTORIES)]
    return sorted(
        path
        for directory in directories
        if directory.is_dir()
        for path in directory.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.suffix not in NOT_COPIED
        and path.name != manifest.NAME
    )


def _check_space(destination: Path, num_bytes: int) -> None:
    parent = next(path for path in destination.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(parent).free, num_bytes + SPARE_BYTES
    if free < needed:
        raise CheckpointError(
            f"{destination} needs {needed:,} bytes, {parent} has {free:,} free; make room for "
            f"{needed - free:,} more or choose another disk"
        )


def _declare_quantization(path: Path, quantization: Quantization) -> None:
    config = json.loads(path.read_text())
    config["quantization_config"] = declare_quantization(quantization)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _declare_dtype(path: Path, dtype: str) -> None:
    """Make config.json say `dtype`, under the keys it has; untouched where it says so already."""
    config = json.loads(path.read_text())
    sections = [config, config.get("text_config", {})]
    stale = [
        (section, key)
        for section in sections
        for key in ("dtype", "torch_dtype")
        if key in section and section[key] != dtype
    ]
    if not any(key in section for section in sections for key in ("dtype", "torch_dtype")):
        stale.append((config, "torch_dtype"))
    for section, key in stale:
        section[key] = dtype
    if stale:
        path.write_text(json.dumps(config, indent=2) + "\n")
