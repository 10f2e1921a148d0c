"""Where devices talk. No other module names a mesh axis in a computation.

Every function runs inside `jax.shard_map` over a (stage, tensor) mesh and is free on an axis of
one.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.mesh import STAGE, TENSOR


def num_stages() -> int:
    return lax.axis_size(STAGE)


def stage_index() -> jax.Array | int:
    return lax.axis_index(STAGE) if num_stages() > 1 else 0


def tensor_index() -> jax.Array | int:
    return lax.axis_index(TENSOR) if lax.axis_size(TENSOR) > 1 else 0


def num_tensor() -> int:
    return lax.axis_size(TENSOR)


def vocab_shard_index() -> jax.Array | int:
    """Which piece of the vocabulary this device holds."""
    return stage_index() * lax.axis_size(TENSOR) + tensor_index()


def sum_over_tensor(x: jax.Array) -> jax.Array:
    """Adds up the partial products of row-parallel weights."""
    return lax.psum(x, TENSOR) if lax.axis_size(TENSOR) > 1 else x


def mean_over_tensor(x: jax.Array) -> jax.Array:
    return lax.pmean(x, TENSOR) if lax.axis_size(TENSOR) > 1 else x


def sum_over_vocab(x: jax.Array) -> jax.Array:
    """Adds up what the devices of a replica found in their pieces of the vocabulary."""
    axes = tuple(axis for axis in (STAGE, TENSOR) if lax.axis_size(axis) > 1)
    return lax.psum(x, axes) if axes else x


def gather_vocab(x: jax.Array) -> jax.Array:
    """Joins the last axis, cut over all devices of a replica, on each of them."""
    for axis in (TENSOR, STAGE):
        if lax.axis_size(axis) > 1:
            x = lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)
    return x


def to_next_stage(x: jax.Array) -> jax.Array:
    """Hands x on round the ring of stages; the last stage's goes to the first."""
    size = num_stages()
    if size == 1:
        return x
    return lax.ppermute(x, STAGE, [(i, (i + 1) % size) for i in range(size)])


def from_last_stage(x: jax.Array) -> jax.Array:
    """The last stage's x, on every stage."""
    size = num_stages()
    if size == 1:
        return x
    return lax.psum(jnp.where(stage_index() == size - 1, x, jnp.zeros_like(x)), STAGE)
