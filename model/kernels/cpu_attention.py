"""Decode rows one after the other, in plain XLA: what a CPU does best.

Its products of a row are matrices, not batches of small ones, what a row reads fits a core's cache,
and a short row doesn't wait for a long one. It does not know requests.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.kernels import xla_attention
from model.pages import Pages

BLOCK = 128
"""Keys per turn of a row's loop."""

SIDE_BY_SIDE_HEADS = 16
"""Query heads up to which kv heads are taken side by side: beyond, the zeros cost too much."""


def paged_attention(
    q_R1KGC: Float[Array, "R 1 K G C"],
    pages: Pages,
    tables_RW: Int[Array, "R W"],
    starts_R: Int[Array, "R"],
    lengths_R: Int[Array, "R"],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
    sinks_KG: Float[Array, "K G"] | None = None,
) -> Float[Array, "R 1 K G U"]:
    """As `model/kernels/xla_attention.py`'s, for rows of one query."""
    rules = {"scale": scale, "window": window, "softcap": softcap, "sinks_KG": sinks_KG}
    _, _, K, G, _ = q_R1KGC.shape
    narrow = K > 1 and K * G <= SIDE_BY_SIDE_HEADS and pages.key_scales is None
    attend = _side_by_side if narrow else xla_attention.attend_rows

    def attend_one(row: tuple[jax.Array, ...]) -> jax.Array:
        q, table, start, length = (part[None] for part in row)
        return attend(q, pages, table, start, length, block_tokens=BLOCK, **rules)[0]

    return lax.map(attend_one, (q_R1KGC, tables_RW, starts_R, lengths_R))


def _side_by_side(
    q_RTKGC: jax.Array,
    pages: Pages,
    *rows: jax.Array,
    sinks_KG: jax.Array | None,
    **rules: Any,
) -> jax.Array:
    """The kv heads laid side by side as one of K x C channels.

    Each query is zero outside its own head's channels, and keeps only those of the answer. A few
    queries then meet a token's keys in one piece, as they lie in the page, and a product of K x G
    columns costs no more than K products of G.
    """
    P, page_size, K, C = pages.keys.shape
    R, T, _, G, _ = q_RTKGC.shape
    own = jnp.eye(K, dtype=q_RTKGC.dtype)[:, None, :, None]
    q_RTYD = (q_RTKGC[:, :, :, :, None] * own).reshape(R, T, 1, K * G, K * C)
    out_RTYD = xla_attention.attend_rows(
        q_RTYD,
        jax.tree.map(lambda cached: cached.reshape(P, page_size, 1, -1), pages),
        *rows,
        sinks_KG=None if sinks_KG is None else sinks_KG.reshape(1, K * G),
        **rules,
    )
    return jnp.einsum("rtkgku->rtkgu", out_RTYD.reshape(R, T, K, G, K, -1))
