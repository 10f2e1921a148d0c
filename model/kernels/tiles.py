"""What kernels of the Triton back end have in common: tiles are powers of two, arrays needn't be.

It does not know attention.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

Place = tuple[Any, ...]

LEAST_TILE = 16
"""Rows of the smallest tensor-core product; a tile with fewer is padded to as many."""

NUM_CORES = 132
"""Multiprocessors of an H100 or H200 (SXM)."""


def power_of_two(number: int) -> int:
    """The smallest that is at least `number`."""
    return 1 << (number - 1).bit_length()


def beyond_offsets(cached: jax.Array) -> str:
    """Why a kernel would miss places of these pages; empty where it doesn't.

    Pallas (0.11.2) counts in 32 bits up to 2**32 bytes; a byte a number then overflows them.
    """
    if cached.size >= 2**31 and cached.size * cached.dtype.itemsize <= 2**32:
        return f"{cached.size:,} numbers a layer in {cached.dtype.name} pages"
    return ""


def places(
    index: tuple[Any, ...], width: int, mask_X: jax.Array | None = None, first: int = 0
) -> tuple[Place, jax.Array | None]:
    """Where `width` numbers from `first` on lie at each index, and which of them exist.

    `index` holds scalars and arrays [X]; the last axis is padded to a power of two. No mask where
    all exist: it would cost instructions.
    """
    padded = power_of_two(width)
    channel = lax.iota(jnp.int32, padded)
    index = tuple(jnp.asarray(i) for i in index)
    place = (*(i[:, None] if i.ndim else i for i in index), first + channel[None, :])
    masks = [] if mask_X is None else [mask_X[:, None]]
    masks += [] if padded == width else [(channel < width)[None, :]]
    if not masks:
        return place, None
    sizes = [array.shape[0] for array in (*index, mask_X) if array is not None and array.ndim]
    shape = (sizes[0] if sizes else 1, padded)
    return place, jnp.broadcast_to(reduce(jnp.logical_and, masks), shape)


def load(ref: Any, place: Place, mask: jax.Array | None) -> jax.Array:
    """What lies at `place`, and 0 where the mask is false."""
    if mask is None:
        return plgpu.load(ref.at[place])
    return plgpu.load(ref.at[place], mask=mask, other=0.0)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b summed in float32; float32 is never rounded to TF32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)
