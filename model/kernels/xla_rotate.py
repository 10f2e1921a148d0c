"""From a layer's qkv product to queries and written pages, in plain XLA.

It does not know where the product came from or who attends.
"""

from jax import lax
from jaxtyping import Array, Float, Int

from model.linear import Norm, rms_norm
from model.pages import Pages, write_pages
from model.rope import apply_rope, rope_angles


def rotate_and_write(
    qkv_NKJC: Float[Array, "N K J C"],
    norms: tuple[Norm, Norm] | None,
    positions_N: Int[Array, "N"],
    inv_freq_H: Float[Array, " H"],
    rope_factor: Float[Array, ""],
    pages: Pages,
    page_N: Int[Array, "N"],
) -> tuple[Float[Array, "N K G C"], Pages]:
    """Queries, normalized and rotated, and the pages with keys (likewise) and values written.

    J is G + 2: a kv head's queries, its key, its value. `norms` are those of q and k;
    token n is written to page `page_N[n]`, at its position's place in the page.
    """
    N, _, J, C = qkv_NKJC.shape
    q_NKGC, k_NKC, v_NKC = qkv_NKJC[:, :, : J - 2], qkv_NKJC[:, :, J - 2], qkv_NKJC[:, :, J - 1]
    if norms is not None:
        q_NKGC, k_NKC = rms_norm(q_NKGC, norms[0]), rms_norm(k_NKC, norms[1])
    # Without a barrier XLA on CPU (jaxlib 0.11.2) fuses cos and sin into what reads them, and
    # computes them anew for each number of each head.
    angles = lax.optimization_barrier(rope_angles(positions_N, inv_freq_H, rope_factor))
    q_NKGC = apply_rope(q_NKGC.reshape(N, -1, C), *angles).reshape(q_NKGC.shape)
    k_NKC = apply_rope(k_NKC, *angles)
    return q_NKGC, write_pages(pages, k_NKC, v_NKC, page_N, positions_N % pages.page_size)
