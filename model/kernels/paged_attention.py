"""Attention of a few new tokens over keys and values that lie in pages, in plain XLA.

It does not know which request a row belongs to; a row is a page table and a position.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

DECODE_BLOCK = 128
PREFILL_BLOCK = 128
"""Keys taken per turn of the loop, for rows of one query and of many: smaller blocks cost turns,
larger ones visit keys that nobody sees."""

SIDE_BY_SIDE_HEADS = 16
"""Query heads up to which a decode row takes its kv heads side by side: beyond, zeros cost."""

NOTHING_SEEN = -1e30
"""The peak of a query before its first key: finite, so that two of them differ by 0, not NaN."""


def write_pages(
    pages_PpKC: Float[Array, "P p K C"],
    new_NKC: Float[Array, "N K C"],
    page_N: Int[Array, "N"],
    offset_N: Int[Array, "N"],
) -> Float[Array, "P p K C"]:
    """Puts token n's keys (or values) at place `offset_N[n]` of page `page_N[n]`.

    What is not finite is written as 0: pages pass from request to request, and a place that a row
    does not see yet still meets a weight of 0, which would not silence a NaN.

    The cache is donated and must be written in place. XLA on CPU (jaxlib 0.11.2) makes the write of
    a single token an update that copies the cache, so a single token is written with a second one,
    to the null page.
    """
    if page_N.shape[0] == 1:
        page_N = jnp.pad(page_N, (0, 1))
        offset_N, new_NKC = jnp.tile(offset_N, 2), jnp.tile(new_NKC, (2, 1, 1))
    new_NKC = new_NKC.astype(pages_PpKC.dtype)
    new_NKC = jnp.where(jnp.isfinite(new_NKC), new_NKC, 0)
    return pages_PpKC.at[page_N, offset_N].set(new_NKC)


def paged_attention(
    q_RTKGC: Float[Array, "R T K G C"],
    k_PpKC: Float[Array, "P p K C"],
    v_PpKU: Float[Array, "P p K U"],
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
    rules = {"scale": scale, "window": window, "softcap": softcap}
    if q_RTKGC.shape[1] == 1:
        heads = q_RTKGC.shape[2] * q_RTKGC.shape[3]
        attend = _attend_side_by_side if heads <= SIDE_BY_SIDE_HEADS else _attend
        rows = (q_RTKGC, tables_RW, starts_R, lengths_R)
        return attend(k_PpKC, v_PpKU, *rows, DECODE_BLOCK, sinks_KG=sinks_KG, **rules)

    def attend_one(row: tuple[jax.Array, ...]) -> jax.Array:
        q, table, start, length = (part[None] for part in row)
        return _attend(
            k_PpKC, v_PpKU, q, table, start, length, PREFILL_BLOCK, sinks_KG=sinks_KG, **rules
        )[0]

    return lax.map(attend_one, (q_RTKGC, tables_RW, starts_R, lengths_R))


def _attend_side_by_side(
    k_PpKC: jax.Array,
    v_PpKU: jax.Array,
    q_RTKGC: jax.Array,
    *rows_and_block: Any,
    sinks_KG: jax.Array | None,
    **rules: Any,
) -> jax.Array:
    """`_attend` with the kv heads laid side by side as one of K x C channels.

    Each query is zero outside its own head's channels, and keeps only those of the answer. A few
    queries then meet a token's keys in one piece, as they lie in the page, and a product of K x G
    columns costs a CPU no more than K products of G.
    """
    P, page_size, K, C = k_PpKC.shape
    R, T, _, G, _ = q_RTKGC.shape
    own = jnp.eye(K, dtype=q_RTKGC.dtype)[:, None, :, None]
    q_RTYD = (q_RTKGC[:, :, :, :, None] * own).reshape(R, T, 1, K * G, K * C)
    out_RTYD = _attend(
        k_PpKC.reshape(P, page_size, 1, -1),
        v_PpKU.reshape(P, page_size, 1, -1),
        q_RTYD,
        *rows_and_block,
        sinks_KG=None if sinks_KG is None else sinks_KG.reshape(1, K * G),
        **rules,
    )
    return jnp.einsum("rtkgku->rtkgu", out_RTYD.reshape(R, T, K, G, K, -1))


def _attend(
    k_PpKC: jax.Array,
    v_PpKU: jax.Array,
    q_RTKGC: jax.Array,
    tables_RW: jax.Array,
    starts_R: jax.Array,
    lengths_R: jax.Array,
    block_tokens: int,
    *,
    scale: float,
    window: jax.Array,
    softcap: float | None,
    sinks_KG: jax.Array | None,
) -> jax.Array:
    """`paged_attention` over rows that visit the same blocks."""
    R, T, K, G, C = q_RTKGC.shape
    page_size, X = k_PpKC.shape[1], G * T
    block_pages = max(1, min(block_tokens // page_size, tables_RW.shape[1]))
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
        k_RKSC, v_RKSU = (
            _gather(cached, table).astype(q_RKXC.dtype) for cached in (k_PpKC, v_PpKU)
        )
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
    carry = (peak_RKX, total_RKX, jnp.zeros((R, K, X, v_PpKU.shape[-1])))
    if num_blocks == 1:
        carry = visit(0, carry)
    else:
        # Padding rows start at 0; they must not undo what a window skips.
        earliest = jnp.min(jnp.where(lengths_R > 0, starts_R, jnp.max(starts_R)))
        first = jnp.maximum(earliest - window + 1, 0) // block
        last = jnp.clip(-(-jnp.max(starts_R + lengths_R) // block), 1, num_blocks)
        carry = lax.fori_loop(first, last, visit, carry)
    _, total_RKX, sum_RKXU = carry
    out_RKXU = sum_RKXU / jnp.maximum(total_RKX, 1e-30)[..., None]
    out_RKGTU = out_RKXU.reshape(R, K, G, T, -1).astype(q_RTKGC.dtype)
    return out_RKGTU.transpose(0, 3, 1, 2, 4)


def _gather(pages_PpKC: jax.Array, table_RW: jax.Array) -> jax.Array:
    """The tokens of each row's pages by head, [R, K, S, C].

    One gather of single heads: gathering pages and then turning them writes everything twice.
    """
    _, page_size, K, C = pages_PpKC.shape
    token_RS = (table_RW[..., None] * page_size + lax.iota(jnp.int32, page_size)).reshape(
        table_RW.shape[0], -1
    )
    place_RKS = token_RS[:, None] * K + lax.iota(jnp.int32, K)[:, None]
    return pages_PpKC.reshape(-1, C)[place_RKS]
