"""Random weights and caches, made on the devices they lie on, where only time and bytes matter.

It does not know programs' arguments but by shape, weights apart.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from model.attention import NO_WINDOW
from model.partition import Partition
from model.weights import QUANTIZED_DTYPES
from serve.programs import Programs

SPREAD = 0.035
"""Half the width of the uniform distribution: a standard deviation of 0.02, as models begin."""

LARGEST = 100
"""Of the whole numbers in quantized weights."""


def random_weights(programs: Programs) -> list[jax.Array]:
    """What a step of `programs` takes as weights. Windows are the model's, since they decide work;
    RoPE's numbers are not."""
    _, weights = programs.abstract_weights()
    cuts, _, _ = programs.argument_cuts()
    filled = random_arrays(jax.tree.leaves(weights), programs.shardings(cuts))
    for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(weights)[0]):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if place := re.match(r"layers\.(\d+)\.attention\.window\b", name):
            windows = jnp.asarray(_windows(programs.partition, int(place[1])), jnp.int32)
            filled[i] = jax.device_put(windows, filled[i].sharding)
    return filled


def random_arrays(shapes: Any, shardings: Any) -> Any:
    """Arrays like `shapes`, those of floats and of quantized weights random and others zero.

    Zeros would not do for all: what a GPU draws, and so its clock, depends on the bits.
    """
    leaves, tree = jax.tree.flatten(shapes)
    placed = zip(leaves, jax.tree.leaves(shardings), strict=True)
    return tree.unflatten(
        _maker(leaf.shape, leaf.dtype, sharding)(seed)
        for seed, (leaf, sharding) in enumerate(placed)
    )


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Any:
    """One program for all arrays that are alike, such as those of every layer."""

    def make(seed: jax.Array) -> jax.Array:
        # The device's own generator, which is fast: nobody needs the same numbers elsewhere.
        key = jax.random.key(seed, impl="rbg")
        if dtype in QUANTIZED_DTYPES.values():
            return jax.random.randint(key, shape, -LARGEST, LARGEST + 1, jnp.int8).astype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype)
        return jax.random.uniform(key, shape, dtype, -SPREAD, SPREAD)

    return jax.jit(make, out_shardings=sharding)


def _windows(partition: Partition, place: int) -> list[int]:
    """Of the layers at one place of every stage; of a stage's empty place, the first layer's."""
    layers = partition.config.layers
    numbers = range(place, place + partition.stages * partition.layers_per_stage)
    here = numbers[:: partition.layers_per_stage]
    return [layers[i if i < len(layers) else 0].window or NO_WINDOW for i in here]
