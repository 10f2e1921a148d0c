"""One layer's keys and values in pages, and the plain way to write them.

It does not know layers, requests, or who owns a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

TINY = 1e-30
"""The least scale of int8 pages: a head of zeros is divided by it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """Keys and values; for int8 also what each token's head is to be multiplied by."""

    keys: Num[Array, "P p K C"]
    values: Num[Array, "P p K U"]
    key_scales: Float[Array, "P p K"] | None = None
    value_scales: Float[Array, "P p K"] | None = None

    @property
    def page_size(self) -> int:
        return self.keys.shape[-3]


def empty_pages(keys: tuple[int, ...], values: tuple[int, ...], dtype: Any) -> Pages:
    """Pages of zeros, of shapes [..., P, p, K, C] and [..., P, p, K, U]."""
    dtype = jnp.dtype(dtype)
    scales = [jnp.zeros(shape[:-1], jnp.float32) for shape in (keys, values)]
    return Pages(
        jnp.zeros(keys, dtype), jnp.zeros(values, dtype), *(scales if dtype == jnp.int8 else ())
    )


def write_pages(
    pages: Pages,
    k_NKC: Float[Array, "N K C"],
    v_NKU: Float[Array, "N K U"],
    page_N: Int[Array, "N"],
    offset_N: Int[Array, "N"],
) -> Pages:
    """Puts token n's keys and values at place `offset_N[n]` of page `page_N[n]`.

    What is not finite is written as 0: pages pass from request to request, and a place that a row
    does not see yet still meets a weight of 0, which would not silence a NaN.

    The cache is donated and must be written in place. XLA on CPU (jaxlib 0.11.2) makes the write of
    a single token an update that copies the cache, so a single token is written with a second one,
    to the null page.
    """
    if page_N.shape[0] == 1:
        page_N, offset_N = jnp.pad(page_N, (0, 1)), jnp.tile(offset_N, 2)
        k_NKC, v_NKU = (jnp.tile(x, (2, 1, 1)) for x in (k_NKC, v_NKU))
    (keys,), key_scales = stored([k_NKC], pages.keys.dtype)
    (values,), value_scales = stored([v_NKU], pages.values.dtype)
    new = [keys, values, *(() if key_scales is None else (key_scales, value_scales))]
    leaves, tree = jax.tree.flatten(pages)
    written = [old.at[page_N, offset_N].set(rows) for old, rows in zip(leaves, new, strict=True)]
    return jax.tree.unflatten(tree, written)


def copy_pages(
    pages: Pages, source_N: Int[Array, "N"], target_N: Int[Array, "N"], num: Int[Array, ""]
) -> Pages:
    """Copies the first `num` of the pages `source_N` over the pages `target_N`, in order.

    `pages` lie [stages, P, ...]. One after the other in a loop whose length is data: so one program
    serves any number of them, and nothing else is moved.
    """

    def copy_one(i: jax.Array, pages: Pages) -> Pages:
        def copied(leaf: jax.Array) -> jax.Array:
            page = jax.lax.dynamic_slice_in_dim(leaf, source_N[i], 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(leaf, page, target_N[i], axis=1)

        return jax.tree.map(copied, pages)

    return jax.lax.fori_loop(0, num, copy_one, pages)


def stored(
    parts: Sequence[Float[Array, "*N part"]], dtype: Any
) -> tuple[list[jax.Array], Float[Array, "*N"] | None]:
    """Heads, given as parts of their channels, as pages of `dtype` hold them; scales for int8."""
    parts = [jnp.where(jnp.isfinite(part), part, 0) for part in parts]
    if dtype == jnp.int8:
        parts = [part.astype(jnp.float32) for part in parts]
        peaks = [jnp.max(jnp.abs(part), axis=-1) for part in parts]
        scales = jnp.maximum(reduce(jnp.maximum, peaks), TINY) / 127
        # floor(x + 1/2): kernels have no round().
        rounded = [jnp.floor(part / scales[..., None] + 0.5) for part in parts]
        return [part.astype(jnp.int8) for part in rounded], scales
    if jnp.dtype(dtype).itemsize == 1:
        # Beyond its largest number float8_e4m3fn has only NaN.
        largest = float(jnp.finfo(dtype).max)
        parts = [jnp.clip(part, -largest, largest) for part in parts]
    return [part.astype(dtype) for part in parts], None
