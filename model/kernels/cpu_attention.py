"""Attention over pages in the form that suits a CPU, in plain XLA.

It does not know requests.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.kernels import xla_attention
from model.kernels.xla_attention import Carry, OnlineSoftmax
from model.pages import Pages

MOST_HEADS = 16
"""Query heads up to which kv heads are taken side by side: beyond, the zeros cost too much."""
WIDE = 2048
"""Keys of a turn where a row has as many: a turn costs as much as some hundred keys."""


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
    wide: int = WIDE,
) -> Float[Array, "R T K G U"]:
    """As `model/kernels/xla_attention.py`'s; of rows of one query computed in float32.

    Products this small are slower in bfloat16. The kv heads of a token are taken as one of K x C
    channels: each query is zero outside its own head's channels, and keeps only those of the
    answer. A few queries then meet a token's keys in one piece, as they lie in the page, and a
    product of K x G columns costs no more than K products of G.
    """
    R, T, K, G, _ = q_RTKGC.shape
    rows = (tables_RW, starts_R, lengths_R)
    rules: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "wide": wide}
    if T > 1:
        return _attend(q_RTKGC, pages, *rows, sinks_KG=sinks_KG, **rules)
    dtype, q_R1KGC = q_RTKGC.dtype, q_RTKGC.astype(jnp.float32)
    if K == 1 or K * G > MOST_HEADS or pages.key_scales is not None:
        return _attend(q_R1KGC, pages, *rows, sinks_KG=sinks_KG, **rules).astype(dtype)
    own = jnp.eye(K)[:, None, :, None]
    q_R11YD = (q_R1KGC[:, :, :, :, None] * own).reshape(R, 1, 1, K * G, -1)
    out_R11YD = _attend(
        q_R11YD,
        jax.tree.map(lambda cached: cached.reshape(*cached.shape[:2], 1, -1), pages),
        *rows,
        sinks_KG=None if sinks_KG is None else sinks_KG.reshape(1, K * G),
        **rules,
    )
    return jnp.einsum("rtkgku->rtkgu", out_R11YD.reshape(R, 1, K, G, K, -1)).astype(dtype)


def _attend(
    q_RTKGC: jax.Array,
    pages: Pages,
    tables_RW: jax.Array,
    starts_R: jax.Array,
    lengths_R: jax.Array,
    wide: int,
    **rules: Any,
) -> jax.Array:
    """`xla_attention.paged_attention`, and where rows may be long, blocks of `wide` keys first.

    Those are visited row by row, so that short rows don't wait for a long one; what is left of each
    row by all together, if they have one query each. Which keys a row meets at once depends on the
    row alone: its result is the same in any company.
    """
    page_size = pages.page_size
    block = max(xla_attention.BLOCK, page_size)
    wide = max(wide, block)
    if tables_RW.shape[1] * page_size <= 2 * wide:
        return xla_attention.paged_attention(
            q_RTKGC, pages, tables_RW, starts_R, lengths_R, **rules
        )
    softmax = OnlineSoftmax(q_RTKGC, pages, tables_RW, starts_R, **rules)
    seen_R = jnp.maximum(starts_R - softmax.window + 1, 0)  # the first key that a query sees
    end_R = starts_R + lengths_R
    wide_R = jnp.maximum(end_R // wide, seen_R // wide)  # wide blocks of keys, those unseen too
    carry = _visit_rows(softmax, seen_R // wide, wide_R, wide, softmax.begin())
    first_R = jnp.maximum(wide_R * wide, seen_R) // block
    last_R = -(-end_R // block)
    if q_RTKGC.shape[1] > 1:
        return softmax.end(_visit_rows(softmax, first_R, last_R, block, carry))
    return softmax.end(
        lax.fori_loop(
            0,
            jnp.max(last_R - first_R),
            lambda i, carry: softmax.visit((first_R + i) * block, block, carry),
            carry,
        )
    )


def _visit_rows(
    softmax: OnlineSoftmax, first_R: jax.Array, last_R: jax.Array, block: int, carry: Carry
) -> Carry:
    """Each row's blocks `first .. last - 1`, one row and one block in a turn."""
    num_R = jnp.maximum(last_R - first_R, 0)
    done_R = jnp.cumsum(num_R)

    def visit(i: jax.Array, carry: Carry) -> Carry:
        row = jnp.sum(done_R <= i, dtype=jnp.int32)
        at = first_R[row] + i - (done_R[row] - num_R[row])
        before = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1), carry)
        after = softmax.of_row(row).visit(at[None] * block, block, before)
        return jax.tree.map(
            lambda x, new: lax.dynamic_update_slice_in_dim(x, new, row, 0), carry, after
        )

    return lax.fori_loop(0, done_R[-1], visit, carry)
