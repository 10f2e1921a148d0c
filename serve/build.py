"""From a configuration to an engine: mesh, weights, pages, compiled programs.

It does not know the command line; what takes long is told to a Reporter.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
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
from model.partition import Partition, abstract_weights, load_weights
from serve.config import ConfigError, ServeConfig
from serve.engine import Engine, ModelInfo
from serve.progress import Reporter, Silent
from serve.replicas import Replicas
from serve.programs import CacheShape, Programs
from serve.runner import Runner
from serve.scheduler import Limits, Scheduler
from sharding.mesh import MeshShape, make_meshes

log = logging.getLogger("weft")


def build_engine(
    config: ServeConfig,
    progress: Reporter = Silent,
    clock: Callable[[], float] = time.monotonic,
) -> Engine | Replicas:
    """Loads and compiles what `config` asks for; the caller starts and stops it.

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
    source = open_checkpoint(directory)
    engines = [
        _build_replica(
            config,
            partition,
            mesh,
            source,
            random.Random(config.schedule.seed + i),
            progress,
            clock,
        )
        for i, mesh in enumerate(meshes)
    ]
    return engines[0] if len(engines) == 1 else Replicas(engines)


def _build_replica(
    config: ServeConfig,
    partition: Partition,
    mesh: Mesh,
    source: TensorSource,
    seeds: random.Random,
    progress: Reporter,
    clock: Callable[[], float],
) -> Engine:
    model = partition.config
    dtype = jnp.dtype(model.dtype if config.model.dtype == "auto" else config.model.dtype)
    limits = _limits(config, model)
    _, weights = _load(partition, mesh, source, dtype, progress)
    cache = _cache(config, partition, limits, mesh, weights, dtype)
    pool = PagePool(cache.num_pages, cache.page_size)
    tables = PageTables(pool, limits.max_batch + 1, pool.pages_for(limits.max_context))
    programs = Programs(partition, mesh, cache, limits, tables.width, dtype)
    runner = Runner(programs, weights, tables.array)
    with progress("compiling", len(runner.shapes), "programs") as bar:
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
    scheduler = Scheduler(limits, tables, frozenset(model.eos_ids))
    return Engine(info, scheduler, runner, seeds, clock)


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


def _load(
    partition: Partition, mesh: Mesh, source: TensorSource, dtype: jnp.dtype, progress: Reporter
) -> tuple[Any, Any]:
    _, abstract = abstract_weights(partition, dtype)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    done = 0
    with progress("loading weights", total) as bar:

        def count(name: str, num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            bar.update(done, detail=name)

        return load_weights(partition, source, mesh, dtype, count)


def _cache(
    config: ServeConfig,
    partition: Partition,
    limits: Limits,
    mesh: Mesh,
    weights: Any,
    dtype: Any,
) -> CacheShape:
    """The pool: as configured, or what the memory share holds beside weights and activations."""
    device = mesh.devices.flat[0]
    cache_dtype = dtype if config.cache.dtype == "auto" else jnp.dtype(config.cache.dtype)
    cache = CacheShape(1, config.cache.tokens_per_page(device.platform), cache_dtype)
    num_pages = config.cache.pages
    if num_pages is None:
        weight_bytes = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(weights)
        )
        share = config.cache.memory_share(device.platform)
        memory = _device_memory(mesh)
        beside = weight_bytes + _activation_bytes(partition, limits)
        one_page = cache.page_bytes(partition)
        num_pages = (int(memory * share) - beside) // one_page
        if num_pages < 1:
            raise ConfigError(
                f"{share:.0%} of {memory:,} bytes a device leaves no room for a page of "
                f"{one_page:,} bytes beside {beside:,} bytes of weights and activations; raise "
                "cache.memory_fraction, lower schedule.max_batch or schedule.token_budget, or use "
                "more devices"
            )
        num_pages = min(num_pages, limits.max_batch * -(-limits.max_context // cache.page_size))
    # Page 0 takes padding's writes and holds nobody's tokens.
    return replace(cache, num_pages=num_pages + 1)


def _device_memory(mesh: Mesh) -> int:
    """Bytes a device may use; the devices of a CPU share its memory."""
    stats = mesh.devices.flat[0].memory_stats()
    if stats is not None:
        return stats["bytes_limit"]
    return psutil.virtual_memory().total // mesh.devices.size


def _activation_bytes(partition: Partition, limits: Limits) -> int:
    """An upper estimate of a step's temporaries on one device."""
    model = partition.config
    rows = limits.max_batch + limits.max_chunk_rows
    width = 4 * model.hidden_size + 3 * model.mlp_size // partition.tensor
    # Float32 logits and a few copies of them (penalties, sampling), beside the widest layer's.
    return 4 * (6 * rows * model.vocab_size + limits.token_budget * width)
