"""Multi-head latent attention: queries, keys and values brought up from a token's few numbers.

The simple form: keys and values are brought up before they are cached, for each head. It does not
know how they are attended over (`model/attention.py`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.attention import PagedAttention, Tokens
from model.config import Latent, ModelConfig
from model.kernel_choice import Kernels
from model.linear import Norm, rms_norm
from model.matrix import add_matrix, matrix
from model.pages import Pages, write_pages
from model.projection import project_in
from model.rope import apply_rope, rope_angles


class LatentAttention(PagedAttention):
    """Every device makes the latents of all heads, and of them its own heads' q, k and v."""

    def __init__(
        self, config: ModelConfig, latent: Latent, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        super().__init__(config, dtype, kernels)
        D, K, C = config.hidden_size, config.num_kv_heads, config.head_dim
        self.latent = latent
        if latent.q_rank is None:
            add_matrix(self, "attention.q", (D, K, C), config, dtype)
        else:
            add_matrix(self, "attention.q_down", (D, latent.q_rank), config, dtype)
            self.q_latent_norm = nnx.Param(jnp.zeros((latent.q_rank,), dtype))
            add_matrix(self, "attention.q_up", (latent.q_rank, K, C), config, dtype)
        kv = (D, latent.kv_rank + latent.rope_dim)
        add_matrix(self, "attention.kv_down", kv, config, dtype)
        self.kv_latent_norm = nnx.Param(jnp.zeros((latent.kv_rank,), dtype))
        heads = (latent.kv_rank, K, latent.nope_dim + latent.value_dim)
        add_matrix(self, "attention.kv_up", heads, config, dtype)

    def project(
        self, x_ND: Float[Array, "N D"], norm: Norm | None, pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "N K 1 C"], Pages]:
        latent = self.latent
        x_ND = x_ND if norm is None else rms_norm(x_ND, norm)
        angles = rope_angles(tokens.positions_N, self.inv_freq[...], self.rope_factor[...])
        q_NKC, turning_q_NKC = jnp.split(self._queries(x_ND), [latent.nope_dim], axis=-1)
        q_NKC = jnp.concatenate([q_NKC, apply_rope(turning_q_NKC, *angles)], axis=-1)

        down = project_in(self.kernels, x_ND, None, matrix(self, "kv_down"))
        kv, turning_k = jnp.split(down, [latent.kv_rank], axis=-1)
        norm = Norm(self.kv_latent_norm[...], latent.norm_eps)
        kv = project_in(self.kernels, kv, norm, matrix(self, "kv_up"))
        k_NKC, v_NKU = jnp.split(kv, [latent.nope_dim], axis=-1)
        turned_k_N1C = apply_rope(turning_k[:, None], *angles)
        shared = jnp.broadcast_to(turned_k_N1C, (*k_NKC.shape[:2], latent.rope_dim))
        k_NKC = jnp.concatenate([k_NKC, shared], axis=-1)
        offset_N = tokens.positions_N % pages.page_size
        return q_NKC[:, :, None], write_pages(pages, k_NKC, v_NKU, tokens.page_N, offset_N)

    def _queries(self, x_ND: jax.Array) -> jax.Array:
        """[N, K, C], not rotated."""
        if self.latent.q_rank is None:
            return project_in(self.kernels, x_ND, None, matrix(self, "q"))
        down = project_in(self.kernels, x_ND, None, matrix(self, "q_down"))
        norm = Norm(self.q_latent_norm[...], self.latent.norm_eps)
        return project_in(self.kernels, down, norm, matrix(self, "q_up"))
