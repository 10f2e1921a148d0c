"""Measure the host memory that loading takes of a checkpoint larger than that memory.

    python -m bench.load_memory [--layers 5] [--directory DIR]

Writes a converted checkpoint of Llama 3.1 405B's widths and of random numbers (8.4 GB, and 6.4 for
each layer, of disk that is given back at the end), and loads it for tensor=8 as a start does, but
drops each weight once it has arrived: these devices are virtual, and their memory is the host's.
Prints the peak of anonymous memory (RssAnon) beyond what was there before, against the bound

    2 x a shard of the largest weight for each device + 0.25 GiB

one of which is on its way to the devices, as everywhere, and one of which has arrived. What the
process has mapped of the files (RssFile) is told apart: it is the system's copy of them, which it
takes back whenever it wants. Exits 1 if the bound is exceeded.
"""

import argparse
import json
import math
import multiprocessing
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.disk import forget, read_apart_s, weight_files
from model.checkpoint import TensorSpec, open_checkpoint
from model.checkpoint.cast import DTYPES
from model.checkpoint.manifest import Manifest, TensorRecord
from model.checkpoint.orbax_store import WEIGHTS, write_orbax
from model.checkpoint.source import Block
from model.families import read_config, read_model_config
from model.loading import stream_weights
from model.partition import Partition, abstract_weights
from model.weights import shapes
from serve.commands.devices import ensure_devices
from serve.config import MeshSection
from serve.progress import Progress, Reporter
from sharding.mesh import MeshShape, make_meshes

LLAMA_405B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16_384,
    "intermediate_size": 53_248,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128_256,
}
TENSOR = 8
BLOCK_ROWS = 2048
"""Of a weight, written at a time: blocks of at most 0.5 GB, and files as `weft convert` makes."""
SAMPLE_S = 0.01
GIB = 1 << 30
SPARE_BYTES = GIB // 4
"""Threads' own memory, and what the allocators keep for the next."""


@dataclass(frozen=True)
class Found:
    num_bytes: int
    seconds: float
    in_transit_bytes: int
    """A shard of the largest weight for each device."""
    anonymous_bytes: int
    """The peak, beyond what was there before."""
    mapped_bytes: int
    """The most of the files that was mapped, likewise."""

    @property
    def bound_bytes(self) -> int:
        return 2 * self.in_transit_bytes + SPARE_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the host memory of loading.")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    config = LLAMA_405B | {"num_hidden_layers": args.layers}
    num_bytes = sum(spec.num_bytes for spec in _specs(config).values())
    free = shutil.disk_usage(args.directory).free
    if free < 1.05 * num_bytes:
        sys.exit(
            f"{args.layers} layers are {num_bytes:,} bytes, {args.directory} has {free:,} free; "
            "lower --layers or choose another --directory"
        )
    ensure_devices(MeshSection(tensor=TENSOR))
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        directory = Path(scratch)
        # Apart, or memory that writing left behind would be taken up again unseen.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            apart.submit(write_checkpoint, directory, config).result()
        files = weight_files(directory)
        cold = forget(files)
        plain_s = read_apart_s(directory, keep=False)
        cold = forget(files) and cold
        found = load(directory, MeshShape(tensor=TENSOR), Progress)
    rate, plain_rate = (num_bytes / seconds / 1e9 for seconds in (found.seconds, plain_s))
    print(
        f"{num_bytes / 1e9:.1f} GB {'from the disk' if cold else 'partly from memory'} in "
        f"{found.seconds:.0f} s: {rate:.2f} GB/s, {rate / plain_rate:.0%} of the "
        f"{plain_rate:.2f} GB/s of plain reads\n"
        f"anonymous memory: peak {found.anonymous_bytes / GIB:.2f} GiB beyond the start, bound "
        f"{found.bound_bytes / GIB:.2f} GiB (a shard of the largest weight for each device: "
        f"{found.in_transit_bytes / GIB:.2f} GiB)\n"
        f"mapped of the files: at most {found.mapped_bytes / GIB:.2f} GiB"
    )
    within = found.anonymous_bytes <= found.bound_bytes
    print("within the bound" if within else "EXCEEDS THE BOUND")
    return 0 if within else 1


def write_checkpoint(directory: Path, config: Mapping[str, Any]) -> None:
    """The converted checkpoint, of random numbers, that `config`, a config.json, asks for."""
    specs = _specs(config)
    (directory / "config.json").write_text(json.dumps(config))
    block_rows = {name: min(spec.shape[0], BLOCK_ROWS) for name, spec in specs.items()}
    write_orbax(directory / WEIGHTS, specs, block_rows, _blocks(specs, block_rows))
    records = {
        name: TensorRecord(shape=spec.shape, dtype=spec.dtype.name, sha256="")
        for name, spec in specs.items()
    }
    Manifest(architecture=config["architectures"][0], tensors=records).save(directory)


def load(directory: Path, shape: MeshShape, progress: Reporter) -> Found:
    """Loads the checkpoint as a start does, but keeps no weight."""
    config = read_model_config(directory)
    partition, mesh = Partition(config, shape.stage, shape.tensor), make_meshes(shape)[0]
    _, abstract = abstract_weights(partition, DTYPES[config.dtype])
    source = open_checkpoint(directory)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    largest = done = 0
    started = time.monotonic()
    with Peaks() as peaks, progress("loading weights", total) as bar:
        for name, weight in stream_weights(partition, source, mesh, abstract):
            shard = weight.addressable_shards[0].data
            largest, done = max(largest, shard.nbytes), done + weight.nbytes
            bar.update(done, detail=name)
            del shard, weight  # or it would stay while the next arrives
    return Found(
        num_bytes=done,
        seconds=time.monotonic() - started,
        in_transit_bytes=largest * shape.num_devices,
        anonymous_bytes=peaks.beyond["RssAnon"],
        mapped_bytes=peaks.beyond["RssFile"],
    )


class Peaks:
    """What of the process's memory was resident at most while it was entered, beyond the start."""

    def __init__(self) -> None:
        self.beyond: dict[str, int] = {}
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peaks":
        self._before = resident_bytes()
        self.beyond = dict.fromkeys(self._before, 0)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            for kind, num_bytes in resident_bytes().items():
                beyond = num_bytes - self._before[kind]
                self.beyond[kind] = max(self.beyond[kind], beyond)


def resident_bytes() -> dict[str, int]:
    """Of this process, by the kernel's kinds of pages: RssAnon, RssFile, RssShmem."""
    status = Path("/proc/self/status").read_text()
    return {kind: int(kib) * 1024 for kind, kib in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}


def _specs(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    model = read_config(config)
    return {name: TensorSpec(shape, DTYPES[model.dtype]) for name, shape in shapes(model).items()}


def _blocks(specs: Mapping[str, TensorSpec], block_rows: Mapping[str, int]) -> Iterator[Block]:
    """All cut of the same random bits: making new ones would take longer than writing them."""
    row_bytes = {
        name: math.prod(spec.shape[1:]) * spec.dtype.itemsize for name, spec in specs.items()
    }
    bits = np.random.default_rng(0).bytes(max(block_rows[n] * row_bytes[n] for n in specs))
    for name, spec in specs.items():
        for start in range(0, spec.shape[0], block_rows[name]):
            num_rows = min(block_rows[name], spec.shape[0] - start)
            numbers = np.frombuffer(bits, spec.dtype, num_rows * math.prod(spec.shape[1:]))
            yield Block(name, start, numbers.reshape(num_rows, *spec.shape[1:]))


if __name__ == "__main__":
    sys.exit(main())
