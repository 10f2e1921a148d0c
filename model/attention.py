"""Self-attention of one layer over paged keys and values.

It does not know requests; `Tokens` says where each new token stands and where its keys go. How
queries, keys and values are made is a subclass's: here from one product, in
`model/latent_attention.py` from low-rank latents.
"""

from abc import abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.kernel_choice import Kernels
from model.kernels import paged_attention, rotate_and_write
from model.linear import Norm
from model.matrix import add_matrix, matrix
from model.pages import Pages
from model.projection import project_in, project_out
from sharding.collectives import mean_over_tensor

NO_WINDOW = 2**30
"""A window wider than any context; windows are data, so that stages may differ in them."""


class Constant(nnx.Variable):
    """A layer's numbers that come from the configuration, not from the checkpoint."""


@dataclass(frozen=True)
class Tokens:
    """The new tokens of a step: `num_decode` rows of one, then rows of `chunk` tokens each."""

    positions_N: Int[Array, "N"]
    page_N: Int[Array, "N"]
    """Where each token's keys and values are written, at its position's place in the page."""
    tables_RW: Int[Array, "R W"]
    starts_R: Int[Array, "R"]
    lengths_R: Int[Array, "R"]
    num_decode: int
    chunk: int


class PagedAttention(nnx.Module):
    """What is the same however queries, keys and values are made."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, kernels: Kernels) -> None:
        D, K, G, U = config.hidden_size, config.num_kv_heads, config.group_size, config.value_dim
        self.config = config
        self.kernels = kernels
        add_matrix(self, "attention.out", (K, G, U, D), config, dtype)
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros((D,), dtype))
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((K, G), dtype))
        self.inv_freq = Constant(jnp.zeros((config.rope_dim // 2,), jnp.float32))
        self.rope_factor = Constant(jnp.zeros((), jnp.float32))
        self.window = Constant(jnp.zeros((), jnp.int32))

    @abstractmethod
    def project(
        self, x_ND: Float[Array, "N D"], norm: Norm | None, pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "N K G C"], Pages]:
        """This device's queries, rotated, and the pages with the tokens' keys and values."""

    def __call__(
        self,
        x_ND: Float[Array, "N D"],
        norm: Norm | None,
        residual_ND: Float[Array, "N D"] | None,
        pages: Pages,
        tokens: Tokens,
    ) -> tuple[Float[Array, "N D"], Pages]:
        """Attends over cached tokens and these, norm(x); returns residual + output, and pages."""
        q_NKGC, pages = self.project(x_ND, norm, pages, tokens)
        y_NKGU = self._attend(q_NKGC, pages, tokens)
        bias_D = self.out_bias[...] if self.config.out_bias else None
        return project_out(self.kernels, y_NKGU, matrix(self, "out"), bias_D, residual_ND), pages

    def _attend(self, q_NKGC: jax.Array, pages: Pages, tokens: Tokens) -> jax.Array:
        """Decode rows and chunk rows, each as one call over its own shape."""
        B = tokens.num_decode
        groups = [(q_NKGC[:B], slice(0, B), 1), (q_NKGC[B:], slice(B, None), tokens.chunk)]
        outs = [
            paged_attention(
                self.kernels,
                q.reshape(-1, length, *q.shape[1:]),
                pages,
                tokens.tables_RW[rows],
                tokens.starts_R[rows],
                tokens.lengths_R[rows],
                scale=self.config.attention_scale,
                window=self.window[...],
                softcap=self.config.attention_softcap,
                sinks_KG=self.sinks[...] if self.config.sinks else None,
            ).reshape(*q.shape[:-1], self.config.value_dim)
            for q, rows, length in groups
            if q.shape[0]
        ]
        return jnp.concatenate(outs) if len(outs) > 1 else outs[0]


class Attention(PagedAttention):
    """Queries, keys and values from one product, in heads of one width."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, kernels: Kernels) -> None:
        super().__init__(config, dtype, kernels)
        D, K, G, C = config.hidden_size, config.num_kv_heads, config.group_size, config.head_dim
        add_matrix(self, "attention.qkv", (D, K, G + 2, C), config, dtype)
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((K, G + 2, C), dtype))
        if config.qk_norm == "head":
            self.q_norm = nnx.Param(jnp.zeros((C,), dtype))
            self.k_norm = nnx.Param(jnp.zeros((C,), dtype))
        if config.qk_norm == "all":
            self.q_norm_all = nnx.Param(jnp.zeros((K, G, C), dtype))
            self.k_norm_all = nnx.Param(jnp.zeros((K, C), dtype))

    def project(
        self, x_ND: Float[Array, "N D"], norm: Norm | None, pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "N K G C"], Pages]:
        bias = self.qkv_bias[...] if self.config.qkv_bias else None
        qkv_NKJC = project_in(self.kernels, x_ND, norm, matrix(self, "qkv"), bias)
        norms = None
        if self.config.qk_norm == "head":
            eps, offset = self.config.norm_eps, self.config.norm_offset
            q_norm, k_norm = (Norm(w[...], eps, offset) for w in (self.q_norm, self.k_norm))
            norms = (q_norm, k_norm)
        if self.config.qk_norm == "all":
            qkv_NKJC = self._norm_all(qkv_NKJC)
        return rotate_and_write(
            self.kernels,
            qkv_NKJC,
            norms,
            tokens.positions_N,
            self.inv_freq[...],
            self.rope_factor[...],
            pages,
            tokens.page_N,
        )

    def _norm_all(self, qkv_NKJC: jax.Array) -> jax.Array:
        """Queries and keys each normalized over all heads' channels at once."""
        G, eps, offset = self.config.group_size, self.config.norm_eps, self.config.norm_offset
        q_NKGC = _norm_all_heads(qkv_NKJC[:, :, :G], self.q_norm_all[...], eps, offset)
        k_NKC = _norm_all_heads(qkv_NKJC[:, :, G], self.k_norm_all[...], eps, offset)
        return jnp.concatenate([q_NKGC, k_NKC[:, :, None], qkv_NKJC[:, :, G + 1 :]], axis=2)


def _norm_all_heads(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """RMS norm over all heads' channels at once, this device's and the others'."""
    x32 = x.astype(jnp.float32)
    axes = tuple(range(1, x.ndim))
    mean = mean_over_tensor(jnp.mean(x32 * x32, axis=axes, keepdims=True))
    return (x32 * jax.lax.rsqrt(mean + eps) * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
