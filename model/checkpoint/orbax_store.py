"""Orbax checkpoints, written block by block in bounded memory and read region by region.

Orbax keeps the tree, its metadata and the commit; the arrays are zarr 3, one directory each, which
is Orbax's layout without OCDBT. Each file of an array holds many small chunks with a CRC, so that a
device's share of a tensor is read alone, and damage is found by whoever reads it.
It does not know where tensors come from or what they mean to a model.
"""

import contextlib
import errno
import io
import itertools
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from model.checkpoint.manifest import Manifest
from model.checkpoint.source import Block, CheckpointError, Index, TensorSpec, resolve
from model.host_memory import aligned_empty

WEIGHTS = "weights"
FILE_BYTES = 64 << 20  # large enough to stream, small enough that one in flight costs little memory
MIN_CHUNK_BYTES = 64 << 10  # below this a read is all latency
CHUNKS_PER_FILE = 16  # along the cut axis: a share of an 8- or 16-way mesh is whole chunks
WRITES_IN_FLIGHT = 2  # one being copied, one being written
FETCHERS = 8  # files read at once: disks of servers are slow with one request at a time
READERS = 4  # files copied from memory at once; tensorstore has threads of its own for each
AHEAD_BYTES = 256 << 20  # of the tensors that come next: enough to keep a disk busy meanwhile

# The axis along which tensor parallelism usually cuts a weight. A hint for the chunks' shape; any
# region can be read from any layout.
CUT_AXES = {"qkv": 1, "qkv_bias": 0, "out": 0, "gate_up": -1, "down": -2, "head": 1, "embedding": 0}


@dataclass(frozen=True)
class Layout:
    """How an array is cut into files and those into chunks."""

    file_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]


def write_orbax(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    block_rows: Mapping[str, int],
    blocks: Iterable[Block],
) -> None:
    """Write `blocks` as the Orbax checkpoint `directory`, taking each once the last is written.

    The blocks of a tensor are `block_rows[name]` rows each and cover it. Files are not flushed.
    """
    import orbax.checkpoint as ocp  # takes long, and reading needs none of it

    leaves = {
        name: _Leaf(spec, choose_layout(name, spec, block_rows[name]))
        for name, spec in specs.items()
    }
    streaming: Any = _StreamHandler(blocks)
    registry = ocp.type_handlers.create_type_handler_registry((_Leaf, streaming))
    with _quiet_orbax():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(_nest(leaves)))


def choose_layout(name: str, spec: TensorSpec, block_rows: int) -> Layout:
    """Files of at most FILE_BYTES that no two blocks share; chunks that split the cut axis."""
    file_shape = list(spec.shape)
    file_shape[0] = block_rows
    item_bytes = spec.dtype.itemsize
    for axis in range(len(file_shape)):
        step_bytes = math.prod(file_shape[axis + 1 :]) * item_bytes
        if file_shape[axis] * step_bytes <= FILE_BYTES:
            break
        # A power of two divides well into chunks.
        file_shape[axis] = 1 << (max(1, FILE_BYTES // step_bytes).bit_length() - 1)
    chunk_shape = list(file_shape)
    cut_axis = CUT_AXES.get(name.rsplit(".", 1)[-1], 0)
    most = min(CHUNKS_PER_FILE, math.prod(file_shape) * item_bytes // MIN_CHUNK_BYTES)
    pieces = max(
        (n for n in range(2, most + 1) if chunk_shape[cut_axis] % n == 0),
        default=1,
    )
    chunk_shape[cut_axis] //= pieces
    return Layout(tuple(file_shape), tuple(chunk_shape))


@dataclass(frozen=True)
class _Leaf:
    """Stands in Orbax's tree for a tensor whose blocks are still to come."""

    spec: TensorSpec
    layout: Layout


class _StreamHandler:
    """Writes every leaf from one stream of blocks; to readers they are ordinary NumPy leaves.

    It is what Orbax takes for a TypeHandler, without the import that its name would cost.
    """

    def __init__(self, blocks: Iterable[Block]):
        self._blocks = blocks

    def typestr(self) -> str:
        return "np.ndarray"

    async def serialize(self, values, infos, args=None):
        await infos[0].await_path_creation()
        leaves = {
            info.name: (leaf, Path(info.path)) for leaf, info in zip(values, infos, strict=True)
        }
        context = ts.Context({"file_io_sync": False})
        stores: dict[str, ts.TensorStore] = {}
        for block in self._blocks:
            leaf, path = leaves[block.name]
            if block.name not in stores:
                stores[block.name] = ts.open(
                    _spec(path) | _metadata(leaf), create=True, context=context
                ).result()
            _write(stores[block.name], block, leaf.layout.file_shape)
            del block  # or it would stay in memory while the next is made
        return []

    async def metadata(self, infos):
        raise io.UnsupportedOperation("this handler writes only")

    async def deserialize(self, infos, args=None):
        raise io.UnsupportedOperation("this handler writes only")


def _write(store: ts.TensorStore, block: Block, file_shape: tuple[int, ...]) -> None:
    """Write a block file by file; once it returns or raises, nothing here refers to the block."""
    pending: deque[ts.WriteFutures] = deque()
    try:
        for corner in itertools.product(
            *(
                range(0, size, step)
                for size, step in zip(block.array.shape, file_shape, strict=True)
            )
        ):
            region = tuple(
                slice(start, min(start + step, size))
                for start, step, size in zip(corner, file_shape, block.array.shape, strict=True)
            )
            first, *rest = region
            target = (slice(block.start + first.start, block.start + first.stop), *rest)
            pending.append(
                store[target].write(
                    block.array[region], can_reference_source_data_indefinitely=True
                )
            )
            if len(pending) == WRITES_IN_FLIGHT:
                pending.popleft().result()
    finally:
        for write in pending:
            write.result()


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _metadata(leaf: _Leaf) -> dict[str, Any]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    checked = [little_endian, {"name": "crc32c"}]
    sharding = {"chunk_shape": leaf.layout.chunk_shape, "codecs": checked, "index_codecs": checked}
    return {
        # Zeros are stored like any other value, so that what is absent is missing, not zero.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": leaf.spec.shape,
            "data_type": leaf.spec.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": leaf.layout.file_shape},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }


def _nest(leaves: Mapping[str, _Leaf]) -> dict[str, Any]:
    """`{"a.b": leaf}` as `{"a": {"b": leaf}}`; Orbax joins the keys with dots again."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Hide Orbax's warnings that there is no OCDBT and no jax.Array here: both are meant."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class OrbaxSource:
    """A TensorSource over a directory that `convert` wrote."""

    def __init__(self, directory: Path):
        self.manifest = Manifest.load(directory)
        self._weights = (directory / WEIGHTS).absolute()
        self._stores: dict[str, ts.TensorStore] = {}
        self._specs = {
            name: TensorSpec(record.shape, np.dtype(record.dtype))
            for name, record in self.manifest.tensors.items()
        }
        for name in self._specs:
            if not (self._weights / name / "zarr.json").is_file():
                raise CheckpointError(
                    f"{self._weights} lacks tensor {name}, which weft.json lists; convert again"
                )
        # Mapped, files cost neither a copy nor memory to copy to: half the time of a processor.
        self._context = ts.Context({"file_io_mode": {"mode": "memmap"}})
        self._readers = ThreadPoolExecutor(READERS)
        self._fetchers = ThreadPoolExecutor(FETCHERS)
        self._fetches: dict[Path, Future[None]] = {}
        self._asked: set[str] = set()
        self._asking = threading.Lock()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        spec = self._specs[name]
        region = resolve(index, spec.shape)
        array = aligned_empty([cut.stop - cut.start for cut in region], spec.dtype)
        try:
            store = self._open(name)
            self._fetch(name)
            sizes: Any = store.chunk_layout.write_chunk.shape
            reads = [
                self._readers.submit(
                    self._read_file,
                    self._weights.joinpath(name, "c", *map(str, file)),
                    store[part],
                    array[(*place, ...)],
                )
                for file, part, place in _by_file(region, sizes)
                if array.size
            ]
            for read in reads:
                read.result()
        except (ValueError, OSError) as error:  # tensorstore's, of absent and of damaged chunks
            raise CheckpointError(
                f"{self._weights / name} cannot be read: {error}; convert the checkpoint again"
            ) from error
        return array

    def _open(self, name: str) -> ts.TensorStore:
        if name not in self._stores:
            options = {"fill_missing_data_reads": False, "recheck_cached_data": False}
            spec = _spec(self._weights / name) | options
            store = ts.open(spec, context=self._context).result()
            found = TensorSpec(store.shape, store.dtype.numpy_dtype)
            if found != self._specs[name]:
                raise ValueError(f"it is {found}, weft.json says {self._specs[name]}")
            self._stores[name] = store
        return self._stores[name]

    def _read_file(self, file: Path, stored: ts.TensorStore, target: np.ndarray) -> None:
        if file in self._fetches:
            self._fetches[file].result()
        ts.array(target, copy=False).write(stored).result()

    def _fetch(self, name: str) -> None:
        """Has the system read a tensor's files into its memory, and those of the next ones, each
        once: whoever reads one reads the others soon, and mapping alone reads little by little."""
        num_bytes = -self._specs[name].num_bytes
        with self._asking:
            for other in itertools.dropwhile(lambda other: other != name, self._specs):
                if num_bytes >= AHEAD_BYTES:
                    return
                num_bytes += self._specs[other].num_bytes
                if other in self._asked:
                    continue
                self._asked.add(other)
                for file in sorted((self._weights / other / "c").rglob("*")):
                    if file.is_file():
                        self._fetches[file] = self._fetchers.submit(_fetch, file)


def _fetch(file: Path) -> None:
    """Reads it without copying it anywhere: the system keeps it in memory."""
    with file.open("rb") as source, open(os.devnull, "wb") as nowhere:
        done, size = 0, file.stat().st_size
        try:
            while done < size:
                done += os.sendfile(nowhere.fileno(), source.fileno(), done, size - done)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of file systems that don't offer it
                raise


def _by_file(
    region: Index, sizes: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Index, Index]]:
    """For each file that `region` touches, in a grid of files of `sizes`: its place in the grid,
    what of the array it holds of the region, and where in the region that is."""
    for file in itertools.product(
        *(
            range(cut.start // size, -(-cut.stop // size))
            for cut, size in zip(region, sizes, strict=True)
        )
    ):
        part = tuple(
            slice(max(cut.start, i * size), min(cut.stop, (i + 1) * size))
            for cut, i, size in zip(region, file, sizes, strict=True)
        )
        place = tuple(
            slice(inner.start - cut.start, inner.stop - cut.start)
            for inner, cut in zip(part, region, strict=True)
        )
        yield file, part, place
