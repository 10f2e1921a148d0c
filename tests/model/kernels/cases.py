"""Rows of queries over pages dealt at random, and dense attention over them in float64.

It does not know which kernel is tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.pages import Pages, stored

NO_WINDOW = 2**30
QUICKLY = {"xla_backend_optimization_level": 0}
"""For interpreted kernels: half their time is LLVM, which a run of milliseconds doesn't repay."""


def jit(attend: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
    return jax.jit(partial(attend, **options), static_argnames=("scale", "softcap"))


def jit_interpreted(attend: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
    return jax.jit(
        partial(attend, interpret=True, **options),
        static_argnames=("scale", "softcap"),
        compiler_options=QUICKLY,
    )


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for, rows and rules aside."""

    num_new: int = 1
    kv_heads: int = 2
    group: int = 3
    channels: int = 16
    page_size: int = 16
    table_width: int = 64
    num_pages: int = 400


@dataclass(frozen=True)
class Case:
    """Rows over one pool of pages."""

    q_RTKGC: np.ndarray
    k_PpKC: np.ndarray
    v_PpKU: np.ndarray
    tables_RW: np.ndarray
    starts_R: np.ndarray
    lengths_R: np.ndarray
    window: int = NO_WINDOW
    softcap: float | None = None
    sinks_KG: np.ndarray | None = None
    scale: float = 0.4
    dtype: Any = jnp.float32
    """Of queries and sinks."""
    cached: Any = jnp.float32
    """Of pages."""

    @property
    def pages(self) -> Pages:
        (keys, key_scales), (values, value_scales) = (
            _stored(jnp.asarray(x), self.cached) for x in (self.k_PpKC, self.v_PpKU)
        )
        return Pages(keys, values, key_scales, value_scales)

    def run(self, attend: Callable[..., jax.Array]) -> np.ndarray:
        rows = [jnp.asarray(x, jnp.int32) for x in (self.tables_RW, self.starts_R, self.lengths_R)]
        out = attend(
            jnp.asarray(self.q_RTKGC, self.dtype),
            self.pages,
            *rows,
            scale=self.scale,
            window=jnp.int32(self.window),
            softcap=self.softcap,
            sinks_KG=None if self.sinks_KG is None else jnp.asarray(self.sinks_KG, self.dtype),
        )
        assert out.shape == (*self.q_RTKGC.shape[:-1], self.v_PpKU.shape[-1])
        assert out.dtype == self.dtype
        return np.asarray(out, np.float64)

    def widened(self) -> "Case":
        """The same numbers, queries and sinks in float32."""
        sinks_KG = None if self.sinks_KG is None else _rounded(self.sinks_KG, self.dtype)
        q_RTKGC = _rounded(self.q_RTKGC, self.dtype)
        return replace(self, q_RTKGC=q_RTKGC, sinks_KG=sinks_KG, dtype=jnp.float32)

    def check(self, attend: Callable[..., jax.Array], tolerance: float = 1e-5) -> None:
        """Every query that counts is as dense attention has it."""
        found, q_RTKGC = self.run(attend), _rounded(self.q_RTKGC, self.dtype)
        k_PpKC, v_PpKU = read(self.pages)
        for row, length in enumerate(self.lengths_R):
            for t in range(length):
                at = self.starts_R[row] + t
                place = self._places(row, max(0, at - self.window + 1), at + 1)
                expected = self._dense(q_RTKGC[row, t], k_PpKC[place], v_PpKU[place])
                np.testing.assert_allclose(found[row, t], expected, rtol=0, atol=tolerance)

    def _places(self, row: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Pages and offsets of a row's tokens."""
        tokens, page_size = np.arange(begin, end), self.k_PpKC.shape[1]
        return self.tables_RW[row, tokens // page_size], tokens % page_size

    def _dense(self, q_KGC: np.ndarray, k_SKC: np.ndarray, v_SKU: np.ndarray) -> np.ndarray:
        scores = self.scale * np.einsum("kgc,skc->kgs", q_KGC.astype(np.float64), k_SKC)
        if self.softcap is not None:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if self.sinks_KG is not None:
            scores = np.concatenate([scores, self.sinks_KG[..., None]], axis=-1)
            v_SKU = np.concatenate([v_SKU, np.zeros_like(v_SKU[:1])])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("kgs,sku->kgu", weights / weights.sum(-1, keepdims=True), v_SKU)

    @property
    def owned(self) -> np.ndarray:
        """Which places of the pages hold a row's tokens."""
        owned = np.zeros(self.k_PpKC.shape[:2], bool)
        for row, length in enumerate(self.lengths_R):
            owned[self._places(row, 0, self.starts_R[row] + length if length else 0)] = True
        return owned


def case(
    starts: Sequence[int], lengths: Sequence[int], shape: Shape, seed: int = 0, **rules: Any
) -> Case:
    """Rows in pages dealt at random; rows beyond their pages point to the null page."""
    rng = np.random.default_rng(seed)
    dealt = iter(rng.permutation(np.arange(1, shape.num_pages)))
    tables_RW = np.zeros((len(starts), shape.table_width), np.int64)
    for row, end in enumerate(np.add(starts, lengths)):
        for i in range(-(-int(end) // shape.page_size)):
            tables_RW[row, i] = next(dealt)
    head = (shape.kv_heads, shape.channels)
    queries = (len(starts), shape.num_new, shape.kv_heads, shape.group, shape.channels)
    arrays = [
        rng.standard_normal(sizes).astype(np.float32)
        for sizes in (queries, *2 * [(shape.num_pages, shape.page_size, *head)])
    ]
    return Case(*arrays, tables_RW, np.array(starts), np.array(lengths), **rules)


def read(pages: Pages) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as they are meant, in float64."""
    found = [np.asarray(x.astype(jnp.float32), np.float64) for x in (pages.keys, pages.values)]
    if pages.key_scales is not None:
        scales = (pages.key_scales, pages.value_scales)
        found = [x * np.asarray(scale)[..., None] for x, scale in zip(found, scales, strict=True)]
    return found[0], found[1]


@partial(jax.jit, static_argnums=1)
def _stored(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    (x,), scales = stored([x], dtype)
    return x, scales


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x, dtype), np.float32)
