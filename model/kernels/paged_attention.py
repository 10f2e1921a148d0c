"""Attention of a few new tokens over keys and values that lie in pages, in plain XLA.

It does not know which request a row belongs to; a row is a page table and a position.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK_TOKENS = 256
"""Keys taken per turn of the loop: their scores stay in a core's cache."""


def write_pages(
    pages_PpKC: Float[Array, "P p K C"],
    new_NKC: Float[Array, "N K C"],
    slots_N: Int[Array, "N"],
) -> Float[Array, "P p K C"]:
    """Puts token n's keys (or values) at place `slots_N[n]` = page * page_size + offset."""
    flat = pages_PpKC.reshape(-1, *pages_PpKC.shape[2:])
    return flat.at[slots_N].set(new_NKC.astype(flat.dtype)).reshape(pages_PpKC.shape)


def paged_attention(
    q_RTKGC: Float[Array, "R T K G C"],
    k_PpKC: Float[Array, "P p K C"],
    v_PpKC: Float[Array, "P p K C"],
    tables_RW: Int[Array, "R W"],
    starts_R: Int[Array, "R"],
    lengths_R: Int[Array, "R"],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
    sinks_KG: Float[Array, "K G"] | None = None,
) -> Float[Array, "R T K G C"]:
    """Each row's T queries, at positions `start .. start + T - 1`, over its cached tokens.

    A query at position i sees the keys at positions j with i - window < j <= i, itself included:
    its own key is written before. Queries past a row's length give finite numbers nobody reads. The
    softmax is computed in float32, block by block (online), and only as many blocks are visited as
    the longest row needs.
    """
    R, T, K, G, C = q_RTKGC.shape
    page_size = k_PpKC.shape[1]
    block_pages = max(1, min(BLOCK_TOKENS // page_size, tables_RW.shape[1]))
    block = block_pages * page_size
    tables_RW = jnp.pad(tables_RW, ((0, 0), (0, -tables_RW.shape[1] % block_pages)))
    num_blocks = tables_RW.shape[1] // block_pages

    q_RKXC = q_RTKGC.transpose(0, 2, 3, 1, 4).reshape(R, K, G * T, C)
    at_RT = starts_R[:, None] + jnp.arange(T)
    exact = lax.Precision.HIGHEST if q_RTKGC.dtype == jnp.float32 else None

    def visit(i, carry):
        peak, total, sum_RKXC = carry
        table = lax.dynamic_slice_in_dim(tables_RW, i * block_pages, block_pages, axis=1)
        k_RSKC = k_PpKC[table].reshape(R, block, K, C).astype(q_RKXC.dtype)
        v_RSKC = v_PpKC[table].reshape(R, block, K, -1).astype(q_RKXC.dtype)
        scores = scale * jnp.einsum(
            "rkxc,rskc->rkxs",
            q_RKXC,
            k_RSKC,
            preferred_element_type=jnp.float32,
            precision=exact,
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        key_S = i * block + jnp.arange(block)
        seen_RTS = (key_S <= at_RT[..., None]) & (key_S > at_RT[..., None] - window)
        seen = jnp.broadcast_to(seen_RTS[:, None, None], (R, K, G, T, block)).reshape(scores.shape)
        scores = jnp.where(seen, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        sum_RKXC = sum_RKXC * decay[..., None] + jnp.einsum(
            "rkxs,rskc->rkxc",
            weights.astype(v_RSKC.dtype),
            v_RSKC,
            preferred_element_type=jnp.float32,
            precision=exact,
        )
        return new_peak, total * decay + weights.sum(-1), sum_RKXC

    # A finite floor instead of -inf: a block in which a query sees nothing must not give NaN.
    floor = jnp.float32(-1e30)
    if sinks_KG is None:
        peak, total = jnp.full((R, K, G * T), floor), jnp.zeros((R, K, G * T))
    else:
        sink = jnp.broadcast_to(sinks_KG.astype(jnp.float32)[None, :, :, None], (R, K, G, T))
        peak, total = sink.reshape(R, K, G * T), jnp.ones((R, K, G * T))
    carry = (peak, total, jnp.zeros((R, K, G * T, v_PpKC.shape[-1])))
    if num_blocks == 1:
        carry = visit(0, carry)
    else:
        first = jnp.clip((jnp.min(starts_R) - window + 1) // block, 0)
        last = jnp.clip((jnp.max(starts_R + lengths_R) + block - 1) // block, 1, num_blocks)
        carry = lax.fori_loop(first, last, visit, carry)
    _, total, sum_RKXC = carry
    out_RKXC = sum_RKXC / jnp.maximum(total, 1e-30)[..., None]
    out_RKGTC = out_RKXC.reshape(R, K, G, T, -1).astype(q_RTKGC.dtype)
    return out_RKGTC.transpose(0, 3, 1, 2, 4)
