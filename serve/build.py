"""From a configuration to an engine: mesh, weights, pages, compiled programs.

It does not know the command line; what takes long is told to a Reporter.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

from cache.pages import PagePool
from cache.tables import PageTables
from model.checkpoint import CheckpointError, TensorSource, open_checkpoint
from model.config import ModelConfig
from model.families import read_model_config
from model.kernel_choice import Kernels, kernels_for
from model.partition import Partition, abstract_weights, load_weights
from serve.config import ConfigError, ServeConfig
from serve.engine import Engine, ModelInfo
from serve.programs import CacheShape, Programs
from serve.progress import Reporter, Silent
from serve.replicas import Replicas
from serve.runner import Runner
from serve.scheduler import Limits, Scheduler
from sharding.mesh import MeshShape, make_meshes

log = logging.getLogger("weft")


def build_engine(
    config: ServeConfig,
    progress: Reporter = Silent,
    clock: Callable[[], float] = time.monotonic,
    compile_ahead: bool = True,
) -> Engine | Replicas:
    """Loads and compiles what `config` asks for; the caller starts and stops it.

    Without `compile_ahead` each program is compiled when a step first needs it: for work whose
    time doesn't matter, such as a few prompts offline.

    Raises ConfigError, CheckpointError, UnsupportedModel or MeshError, which say what to change.
    """
    directory = Path(config.model.path)
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no model directory {directory}; give model.path a converted or "
            "Hugging Face directory"
        )
    model = read_model_config(directory)
    shape = MeshShape(config.mesh.data, config.mesh.stage, config.mesh.tensor)
    partition = Partition(model, shape.stage, shape.tensor)
    meshes = make_meshes(shape)
    builder = _Builder(config, partition, open_checkpoint(directory), progress, compile_ahead)
    engines: list[Engine] = []
    for i, mesh in enumerate(meshes):
        runner, scheduler, info = builder.replica(mesh)
        seeds = random.Random(config.schedule.seed + i)
        engines.append(Engine(info, scheduler, runner, seeds, clock))
    return engines[0] if len(engines) == 1 else Replicas(engines)


@dataclass(frozen=True)
class _Builder:
    """What the replicas of one configuration have in common."""

    config: ServeConfig
    partition: Partition
    source: TensorSource
    progress: Reporter
    compile_ahead: bool

    def replica(self, mesh: Mesh) -> tuple[Runner, Scheduler, ModelInfo]:
        config, model = self.config, self.partition.config
        dtype = jnp.dtype(model.dtype if config.model.dtype == "auto" else config.model.dtype)
        limits = _limits(config, model)
        kernels = self._kernels(mesh)  # refused, if at all, before the weights are read
        weights = self._load(mesh, dtype)
        cache = self._cache(mesh, limits, weights, dtype)
        pool = PagePool(cache.num_pages, cache.page_size)
        tables = PageTables(pool, limits.max_batch + 1, pool.pages_for(limits.max_context))
        programs = Programs(self.partition, mesh, cache, limits, tables.width, dtype, kernels)
        runner = Runner(programs, weights, tables.array)
        if self.compile_ahead:
            with self.progress("compiling", len(runner.shapes), "programs") as bar:
                runner.compile_all(lambda name, done: bar.update(done, detail=name))
        info = ModelInfo(
            name=config.model.served_name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_context=limits.max_context,
            dtype=dtype.name,
            mesh=dict(mesh.shape) | {"data": 1},
            num_pages=pool.num_usable,
            page_size=pool.page_size,
            max_batch=limits.max_batch,
            eos_ids=model.eos_ids,
        )
        return runner, Scheduler(limits, tables, frozenset(model.eos_ids)), info

    def _kernels(self, mesh: Mesh) -> Kernels:
        platform = mesh.devices.flat[0].platform
        try:
            return kernels_for(platform, self.config.kernels.model_dump())
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _load(self, mesh: Mesh, dtype: Any) -> Any:
        _, abstract = abstract_weights(self.partition, dtype)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        done = 0
        with self.progress("loading weights", total) as bar:

            def count(name: str, num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                bar.update(done, detail=name)

            return load_weights(self.partition, self.source, mesh, dtype, count)

    def _cache(self, mesh: Mesh, limits: Limits, weights: Any, dtype: Any) -> CacheShape:
        """The pool: as configured, or what the memory holds beside weights and activations."""
        config = self.config.cache
        platform = mesh.devices.flat[0].platform
        named = {"auto": dtype, "fp8": jnp.float8_e4m3fn}
        cache_dtype = jnp.dtype(named.get(config.dtype, config.dtype))
        cache = CacheShape(1, config.tokens_per_page(platform), cache_dtype)
        num_pages = config.pages
        memory, one_page = self._device_memory(mesh), cache.page_bytes(self.partition)
        beside = _activation_bytes(self.partition, limits) + sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(weights)
        )
        most = max(0, memory - beside) // one_page
        if num_pages is not None and num_pages > most:
            raise ConfigError(
                f"cache.pages is {num_pages:,}, of {one_page:,} bytes each; {memory:,} bytes a "
                f"device hold at most {most:,} beside {beside:,} bytes of weights and "
                "activations; lower it"
            )
        if num_pages is None:
            share = config.memory_share(platform)
            num_pages = (int(memory * share) - beside) // one_page
            if num_pages < 1:
                raise ConfigError(
                    f"{share:.3%} of {memory:,} bytes a device leaves no room for a page of "
                    f"{one_page:,} bytes beside {beside:,} bytes of weights and activations; raise "
                    "cache.memory_fraction, lower schedule.max_batch or schedule.token_budget, or "
                    "use more devices"
                )
            usable = limits.max_batch * -(-limits.max_context // cache.page_size)
            num_pages = min(num_pages, usable)
        # Page 0 takes padding's writes and holds nobody's tokens.
        return replace(cache, num_pages=num_pages + 1)

    def _device_memory(self, mesh: Mesh) -> int:
        """Bytes a device may use; the devices of a CPU, of all replicas, share its memory."""
        stats = mesh.devices.flat[0].memory_stats()
        if stats is not None:
            return stats["bytes_limit"]
        return psutil.virtual_memory().total // (mesh.devices.size * self.config.mesh.data)


def _limits(config: ServeConfig, model: ModelConfig) -> Limits:
    asked = config.model.max_context
    if asked is not None and asked > model.max_context:
        raise ConfigError(
            f"model.max_context is {asked}, the model was made for {model.max_context}; "
            "lower it or leave it out"
        )
    schedule = config.schedule
    return Limits(
        max_batch=schedule.max_batch,
        token_budget=schedule.token_budget,
        chunk=schedule.chunk,
        max_steps=schedule.max_steps,
        max_queue=schedule.max_queue,
        max_context=asked or model.max_context,
    )


def _activation_bytes(partition: Partition, limits: Limits) -> int:
    """An upper estimate of a step's temporaries on one device."""
    model = partition.config
    rows = limits.max_batch + limits.max_chunk_rows
    width = 4 * model.hidden_size + 3 * model.mlp_size // partition.tensor
    # Float32 logits and a few copies of them (penalties, sampling), beside the widest layer's.
    return 4 * (6 * rows * model.vocab_size + limits.token_budget * width)
