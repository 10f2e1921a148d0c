"""Attention of a few new tokens over keys and values that lie in pages, in plain XLA.

It does not know which request a row belongs to; a row is a page table and a position.
"""

from functools import partial

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
    *,
    scale: float,
    window: jax.Array,
    softcap: float | None,
    sinks_KG: jax.Array | None,
) -> jax.Array:
    """`paged_attention` over rows that visit the same blocks."""
    R, T, K, G, C = q_RTKGC.shape
    page_size, X = pages.page_size, G * T
    block_pages = max(1, min(BLOCK // page_size, tables_RW.shape[1]))
    block = block_pages * page_size
    tables_RW = jnp.pad(tables_RW, ((0, 0), (0, -tables_RW.shape[1] % block_pages)))
    num_blocks = tables_RW.shape[1] // block_pages
    exact = lax.Precision.HIGHEST if q_RTKGC.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=exact)

    q_RKXC = q_RTKGC.transpose(0, 2, 3, 1, 4).reshape(R, K, X, C)
    at_RX = jnp.tile(starts_R[:, None] + lax.iota(jnp.int32, T), (1, G))

    def visit(
        i: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak_RKX, total_RKX, sum_RKXU = carry
        table = lax.dynamic_slice_in_dim(tables_RW, i * block_pages, block_pages, axis=1)
        key_S = i * block + lax.iota(jnp.int32, block)
        k_RKSC = _gather(pages.keys, pages.key_scales, table, q_RKXC.dtype)
        v_RKSU = _gather(pages.values, pages.value_scales, table, q_RKXC.dtype)
        scores = scale * dot("rkxc,rksc->rkxs", q_RKXC, k_RKSC)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen_RXS = (key_S <= at_RX[..., None]) & (key_S > at_RX[..., None] - window)
        scores = jnp.where(seen_RXS[:, None], scores, -jnp.inf)
        new_peak_RKX = jnp.maximum(peak_RKX, scores.max(-1))
        weights = jnp.exp(scores - new_peak_RKX[..., None])
        decay_RKX = jnp.exp(peak_RKX - new_peak_RKX)
        seen_RKXU = dot("rkxs,rksu->rkxu", weights.astype(q_RKXC.dtype), v_RKSU)
        return (
            new_peak_RKX,
            total_RKX * decay_RKX + weights.sum(-1),
            sum_RKXU * decay_RKX[..., None] + seen_RKXU,
        )

    if sinks_KG is None:
        peak_RKX, total_RKX = jnp.full((R, K, X), NOTHING_SEEN), jnp.zeros((R, K, X))
    else:
        sinks_KX = jnp.repeat(sinks_KG.astype(jnp.float32), T, axis=1)
        peak_RKX, total_RKX = jnp.broadcast_to(sinks_KX, (R, K, X)), jnp.ones((R, K, X))
    carry = (peak_RKX, total_RKX, jnp.zeros((R, K, X, pages.values.shape[-1])))
    if num_blocks == 1:
        carry = visit(0, carry)
    else:
        # Padding rows start at 0; they must not undo what a window skips.
        earliest = jnp.min(jnp.where(lengths_R > 0, starts_R, jnp.max(starts_R)))
        first = jnp.maximum(earliest - window + 1, 0) // block
        last = jnp.clip(-(-jnp.max(starts_R + lengths_R) // block), 1, num_blocks)
        carry = lax.fori_loop(first, last, visit, carry)
    _, total_RKX, sum_RKXU = carry
    out_RKXU = sum_RKXU / jnp.maximum(total_RKX, LEAST_TOTAL)[..., None]
    out_RKGTU = out_RKXU.reshape(R, K, G, T, -1).astype(q_RTKGC.dtype)
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
