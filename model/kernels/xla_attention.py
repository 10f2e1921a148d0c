"""Attention of a few new tokens over keys and values that lie in pages, in plain XLA.

It does not know which request a row belongs to; a row is a page table and a position.
"""

from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.pages import Pages

BLOCK = 128
"""Keys taken per turn of the loop: smaller blocks cost turns, larger ones visit keys that nobody
sees."""

NOTHING_SEEN = -1e30
"""The peak of a query before its first key: finite, so that two of them differ by 0, not NaN."""

LEAST_TOTAL = 1e-30
"""Where no key was seen, what 0 is divided by."""


def paged_attention(
    q_RTKGC: Float[Array, "R T K G C"],
    pages: Pages,
    tables_RW: Int[Array, "R W"],
    starts_R: Int[Array, "R"],
    lengths_R: Int[Array, "R"],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
    sinks_KG: Float[Array, "K G"] | None = None,
) -> Float[Array, "R T K G U"]:
    """Each row's T queries, at positions `start .. start + T - 1`, over its cached tokens.

    A query at position i sees the keys at positions j with i - window < j <= i, itself included:
    its own key is written before. Queries past a row's length give finite numbers nobody reads. The
    softmax is computed in float32, block by block (online). Rows of one query are visited together,
    as far as the longest needs; rows of many one after the other, each as far as it needs itself.
    """
    rules = {"scale": scale, "window": window, "softcap": softcap, "sinks_KG": sinks_KG}
    if q_RTKGC.shape[1] == 1:
        return _attend(q_RTKGC, pages, tables_RW, starts_R, lengths_R, **rules)

    def attend_one(row: tuple[jax.Array, ...]) -> jax.Array:
        q, table, start, length = (part[None] for part in row)
        return _attend(q, pages, table, start, length, **rules)[0]

    return lax.map(attend_one, (q_RTKGC, tables_RW, starts_R, lengths_R))


def _attend(
    q_RTKGC: jax.Array,
    pages: Pages,
    tables_RW: jax.Array,
    starts_R: jax.Array,
    lengths_R: jax.Array,
    **rules: Any,
) -> jax.Array:
    """`paged_attention` over rows that visit the same blocks."""
    page_size = pages.page_size
    block = max(1, min(BLOCK // page_size, tables_RW.shape[1])) * page_size
    num_blocks = -(-tables_RW.shape[1] * page_size // block)
    softmax = OnlineSoftmax(q_RTKGC, pages, tables_RW, starts_R, **rules)

    def visit(i: jax.Array | int, carry: Carry) -> Carry:
        return softmax.visit(jnp.full_like(starts_R, i * block), block, carry)

    if num_blocks == 1:
        return softmax.end(visit(0, softmax.begin()))
    # Padding rows start at 0; they must not undo what a window skips.
    earliest = jnp.min(jnp.where(lengths_R > 0, starts_R, jnp.max(starts_R)))
    first = jnp.maximum(earliest - softmax.window + 1, 0) // block
    last = jnp.clip(-(-jnp.max(starts_R + lengths_R) // block), 1, num_blocks)
    return softmax.end(lax.fori_loop(first, last, visit, softmax.begin()))


Carry = tuple[Float[Array, "R K X"], Float[Array, "R K X"], Float[Array, "R K X U"]]
"""Of each query, over the keys visited so far: the largest score, the sum of exponentials, and the
sum of values, both relative to it."""


class OnlineSoftmax:
    """Attention of rows' queries, a block of keys at a time in any order, computed in float32."""

    def __init__(
        self,
        q_RTKGC: Float[Array, "R T K G C"],
        pages: Pages,
        tables_RW: Int[Array, "R W"],
        starts_R: Int[Array, "R"],
        *,
        scale: float,
        window: Int[Array, ""],
        softcap: float | None,
        sinks_KG: Float[Array, "K G"] | None,
    ) -> None:
        R, T, K, G, C = q_RTKGC.shape
        exact = lax.Precision.HIGHEST if q_RTKGC.dtype == jnp.float32 else None
        self.window = window
        self._shape, self._dtype = (R, K, G, T), q_RTKGC.dtype
        self._row_R = lax.iota(jnp.int32, R)
        self._q_RKXC = q_RTKGC.transpose(0, 2, 3, 1, 4).reshape(R, K, G * T, C)
        self._at_RX = jnp.tile(starts_R[:, None] + lax.iota(jnp.int32, T), (1, G))
        self._pages, self._tables_RW = pages, tables_RW
        self._scale, self._softcap, self._sinks_KG = scale, softcap, sinks_KG
        self._dot = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=exact)

    def of_row(self, row: Int[Array, ""]) -> "OnlineSoftmax":
        """The same of one row: visits take its part of a carry."""
        one = copy(self)
        one._q_RKXC, one._at_RX, one._row_R = (
            lax.dynamic_slice_in_dim(x, row, 1) for x in (self._q_RKXC, self._at_RX, self._row_R)
        )
        return one

    def begin(self) -> Carry:
        R, K, G, T = self._shape
        sum_RKXU = jnp.zeros((R, K, G * T, self._pages.values.shape[-1]))
        if self._sinks_KG is None:
            return jnp.full((R, K, G * T), NOTHING_SEEN), jnp.zeros((R, K, G * T)), sum_RKXU
        sinks_KX = jnp.repeat(self._sinks_KG.astype(jnp.float32), T, axis=1)
        return jnp.broadcast_to(sinks_KX, (R, K, G * T)), jnp.ones((R, K, G * T)), sum_RKXU

    def visit(self, first_R: Int[Array, "R"], block: int, carry: Carry) -> Carry:
        """Each row's keys at positions `first .. first + block - 1`, both multiples of a page."""
        peak_RKX, total_RKX, sum_RKXU = carry
        pages, page_size = self._pages, self._pages.page_size
        place_RP = first_R[:, None] // page_size + lax.iota(jnp.int32, block // page_size)
        # Past a table's end are positions that nobody sees.
        table_RP = self._tables_RW.at[self._row_R[:, None], place_RP].get(mode="clip")
        k_RKSC = _gather(pages.keys, pages.key_scales, table_RP, self._dtype)
        v_RKSU = _gather(pages.values, pages.value_scales, table_RP, self._dtype)
        scores = self._scale * self._dot("rkxc,rksc->rkxs", self._q_RKXC, k_RKSC)
        if self._softcap is not None:
            scores = self._softcap * jnp.tanh(scores / self._softcap)
        key_R1S = (first_R[:, None] + lax.iota(jnp.int32, block))[:, None]
        at_RX1 = self._at_RX[..., None]
        seen_RXS = (key_R1S <= at_RX1) & (key_R1S > at_RX1 - self.window)
        scores = jnp.where(seen_RXS[:, None], scores, -jnp.inf)
        new_peak_RKX = jnp.maximum(peak_RKX, scores.max(-1))
        weights = jnp.exp(scores - new_peak_RKX[..., None])
        decay_RKX = jnp.exp(peak_RKX - new_peak_RKX)
        seen_RKXU = self._dot("rkxs,rksu->rkxu", weights.astype(self._dtype), v_RKSU)
        return (
            new_peak_RKX,
            total_RKX * decay_RKX + weights.sum(-1),
            sum_RKXU * decay_RKX[..., None] + seen_RKXU,
        )

    def end(self, carry: Carry) -> Float[Array, "R T K G U"]:
        _, total_RKX, sum_RKXU = carry
        R, K, G, T = self._shape
        out_RKXU = sum_RKXU / jnp.maximum(total_RKX, LEAST_TOTAL)[..., None]
        out_RKGTU = out_RKXU.reshape(R, K, G, T, -1).astype(self._dtype)
        return out_RKGTU.transpose(0, 3, 1, 2, 4)


def _gather(
    cached_PpKC: jax.Array, scales_PpK: jax.Array | None, table_RW: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """The tokens of each row's pages by head, [R, K, S, C].

    One gather of single heads: gathering pages and then turning them writes everything twice.
    """
    _, page_size, K, C = cached_PpKC.shape
    token_RS = (table_RW[..., None] * page_size + lax.iota(jnp.int32, page_size)).reshape(
        table_RW.shape[0], -1
    )
    place_RKS = token_RS[:, None] * K + lax.iota(jnp.int32, K)[:, None]
    found_RKSC = cached_PpKC.reshape(-1, C)[place_RKS]
    if scales_PpK is None:
        return found_RKSC.astype(dtype)
    scales_RKS = scales_PpK.reshape(-1)[place_RKS]
    return (found_RKSC.astype(jnp.float32) * scales_RKS[..., None]).astype(dtype)
