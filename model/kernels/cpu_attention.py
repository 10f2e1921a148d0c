"""Attention over pages in the form that suits a CPU, in plain XLA.

It does not know requests.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.kernels import xla_attention
from model.pages import Pages

MOST_HEADS = 16
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
    """As `model/kernels/xla_attention.py`'s, for rows of one query; computed in float32.

    Products this small are slower in bfloat16. The kv heads of a token are taken as one of K x C
    channels: each query is zero outside its own head's channels, and keeps only those of the
    answer. A few queries then meet a token's keys in one piece, as they lie in the page, and a
    product of K x G columns costs no more than K products of G.
    """
    R, _, K, G, _ = q_R1KGC.shape
    rows = (tables_RW, starts_R, lengths_R)
    rules = {"scale": scale, "window": window, "softcap": softcap}
    dtype, q_R1KGC = q_R1KGC.dtype, q_R1KGC.astype(jnp.float32)
    if K == 1 or K * G > MOST_HEADS or pages.key_scales is not None:
        out_R1KGU = xla_attention.paged_attention(q_R1KGC, pages, *rows, sinks_KG=sinks_KG, **rules)
        return out_R1KGU.astype(dtype)
    own = jnp.eye(K)[:, None, :, None]
    q_R11YD = (q_R1KGC[:, :, :, :, None] * own).reshape(R, 1, 1, K * G, -1)
    out_R11YD = xla_attention.paged_attention(
        q_R11YD,
        jax.tree.map(lambda cached: cached.reshape(*cached.shape[:2], 1, -1), pages),
        *rows,
        sinks_KG=None if sinks_KG is None else sinks_KG.reshape(1, K * G),
        **rules,
    )
    return jnp.einsum("rtkgku->rtkgu", out_R11YD.reshape(R, 1, K, G, K, -1)).astype(dtype)
