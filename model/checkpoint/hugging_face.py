"""Checkpoints as Hugging Face's `save_pretrained` writes them: safetensors files, an index beside.

It does not know families: which of their tensors make which weight comes in as `Weight`s.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from model.checkpoint.contiguous import contiguous
from model.checkpoint.recent import Recent
from model.checkpoint.safetensors_file import SafetensorsWriter, StoredTensor, read_header
from model.checkpoint.source import CheckpointError, Index, TensorSpec, resolve
from model.weights import Weight

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000  # where save_pretrained splits
CACHE_BYTES = 4 << 30  # one layer's experts of the largest open mixtures, packed


class HuggingFaceSource:
    """A TensorSource over a Hugging Face directory, checked by its headers when it is made.

    A weight is packed whole, once, and the last few stay packed, up to `cache_bytes`: that serves
    the readers of all devices' regions of a weight, one after the other or at the same time.
    """

    def __init__(
        self,
        directory: Path,
        weights: Sequence[Weight],
        *,
        ignorable: Callable[[str], bool] = lambda name: False,
        cache_bytes: int = CACHE_BYTES,
    ):
        self._weights = {weight.name: weight for weight in weights}
        self._tensors = _read_headers(directory)
        _check(directory, self._tensors, weights, ignorable)
        self._packed: Recent[np.ndarray] = Recent(cache_bytes, lambda array: array.nbytes)
        self._specs = {
            weight.name: TensorSpec(weight.shape, self._tensors[weight.parts[0][0]].spec.dtype)
            for weight in weights
        }

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        weight = self._weights[name]
        bounds = resolve(index, weight.shape)
        if len(weight.parts) == 1:
            return self._part(weight, 0)[bounds]
        leading, rest = bounds[0], bounds[1:]
        if leading.stop - leading.start == 1:
            return self._part(weight, leading.start)[rest][np.newaxis]
        region = np.empty([part.stop - part.start for part in bounds], self._specs[name].dtype)
        for row, part in enumerate(range(leading.start, leading.stop)):
            region[row] = self._part(weight, part)[rest]
        return region

    def _part(self, weight: Weight, part: int) -> np.ndarray:
        def pack() -> np.ndarray:
            # Nothing names what is read: where `pack` copies, that can go before the next copy.
            packed = weight.pack([self._tensors[name].read() for name in weight.parts[part]])
            assert packed.shape == part_shape(weight), (weight.name, packed.shape)
            return contiguous(packed)

        return self._packed.get((weight.name, part), pack)


def part_shape(weight: Weight) -> tuple[int, ...]:
    """Shape of what `pack` makes: the weight, or one slice of it where it has several parts."""
    return weight.shape if len(weight.parts) == 1 else weight.shape[1:]


def tensor_shapes(weights: Sequence[Weight]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the family, in the order of `weights`.

    Found by unpacking arrays whose elements are all the same byte of memory, once for weights that
    differ only in their numbers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    seen: dict[object, list[tuple[int, ...]]] = {}
    for weight in weights:
        kind = (re.sub(r"\d+", "#", weight.name), weight.shape, len(weight.parts[0]))
        if kind not in seen:
            hollow = np.broadcast_to(np.uint8(0), part_shape(weight))
            seen[kind] = [tensor.shape for tensor in weight.unpack(hollow)]
        for names in weight.parts:
            shapes.update(zip(names, seen[kind], strict=True))
    return shapes


def require_weights(directory: Path) -> None:
    """Raise CheckpointError, saying what was looked for, where no safetensors are."""
    if (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return
    if list(directory.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{directory} holds PyTorch pickles (pytorch_model.bin), which can run code when read; "
            "load the model with transformers and save it with save_pretrained, which writes "
            "safetensors"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f"; it has {', '.join(others)}" if others else ""
    raise CheckpointError(
        f"{directory} has no weights: neither {SINGLE} nor {INDEX}, nor the weft.json of a "
        f"converted checkpoint{found}"
    )


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    require_weights(directory)
    single = directory / SINGLE
    return read_header(single) if single.is_file() else _read_sharded_headers(directory)


def _read_sharded_headers(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    try:
        files = json.loads(index.read_text())["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing; {INDEX} puts tensors in it")
        headers[name] = read_header(directory / name)
    tensors = {key: stored for header in headers.values() for key, stored in header.items()}
    for tensor, name in files.items():
        if tensor not in headers[name]:
            raise CheckpointError(
                f"{directory / name} has no tensor {tensor}; {INDEX} puts it there"
            )
        tensors[tensor] = headers[name][tensor]
    return tensors


def _check(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    weights: Sequence[Weight],
    ignorable: Callable[[str], bool],
) -> None:
    shapes = tensor_shapes(weights)
    if missing := [name for name in shapes if name not in tensors]:
        searched = directory / (SINGLE if (directory / SINGLE).is_file() else INDEX)
        raise CheckpointError(
            f"{searched} lacks {_some(missing)}; is config.json the one these weights came with?"
        )
    unexpected = [name for name in tensors if name not in shapes and not ignorable(name)]
    if unexpected:
        raise CheckpointError(
            f"{directory} holds {_some(unexpected)}, of which its config.json says nothing; "
            "leaving them out could change the model's answers"
        )
    for name, shape in shapes.items():
        if tensors[name].spec.shape != shape:
            raise CheckpointError(
                f"{tensors[name].path}: tensor {name} has shape {list(tensors[name].spec.shape)}; "
                f"config.json asks for {list(shape)}"
            )
    for weight in weights:
        names = [name for part in weight.parts for name in part]
        dtypes = {tensors[name].spec.dtype: name for name in names}
        if len(dtypes) > 1:
            mix = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise CheckpointError(
                f"{directory}: tensors that form {weight.name} differ in dtype: {mix}; save the "
                "checkpoint in one dtype"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"


class HuggingFaceWriter:
    """Writes safetensors files and their index; the tensors may arrive in any order."""

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
    ):
        groups = _split(specs, max_file_bytes)
        count = len(groups)
        self._writers: dict[str, SafetensorsWriter] = {}
        self._stack = ExitStack()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(groups, start=1):
            file = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            writer = SafetensorsWriter(directory / file, {name: specs[name] for name in names})
            self._stack.enter_context(writer)
            self._writers.update(dict.fromkeys(names, writer))
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            metadata = {
                "total_parameters": sum(math.prod(spec.shape) for spec in specs.values()),
                "total_size": sum(spec.num_bytes for spec in specs.values()),
            }
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, array: np.ndarray) -> None:
        self._writers[name].write(name, array)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def _split(specs: Mapping[str, TensorSpec], max_file_bytes: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `max_file_bytes`; a larger tensor is alone."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.num_bytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.num_bytes
    return groups
