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
from model.kernels import paged_attention, write_pages
from model.linear import matmul, rms_norm
from model.rope import apply_rope, rope_angles
from sharding.collectives import mean_over_tensor, sum_over_tensor

NO_WINDOW = 2**30
"""A window wider than any context; windows are data, so that stages may differ in them."""

Pages = tuple[jax.Array, jax.Array]
"""One layer's keys, [P, page_size, K, C], and values, [P, page_size, K, U]."""

Angles = tuple[jax.Array, jax.Array]
"""cos and sin of each token's rotation, [N, rope_dim / 2] each."""


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

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        D, K, G, U = config.hidden_size, config.num_kv_heads, config.group_size, config.value_dim
        self.config = config
        self.out = nnx.Param(jnp.zeros((K, G, U, D), dtype))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros((D,), dtype))
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((K, G), dtype))
        self.inv_freq = Constant(jnp.zeros((config.rope_dim // 2,), jnp.float32))
        self.rope_factor = Constant(jnp.zeros((), jnp.float32))
        self.window = Constant(jnp.zeros((), jnp.int32))

    @abstractmethod
    def project(
        self, x_ND: Float[Array, "N D"], angles: Angles
    ) -> tuple[Float[Array, "N K G C"], Float[Array, "N K C"], Float[Array, "N K U"]]:
        """This device's queries and keys, rotated, and values."""

    def __call__(
        self, x_ND: Float[Array, "N D"], pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "N D"], Pages]:
        """Attends over cached tokens and these; returns the block's output and the new pages."""
        angles = rope_angles(tokens.positions_N, self.inv_freq[...], self.rope_factor[...])
        q_NKGC, k_NKC, v_NKU = self.project(x_ND, angles)
        place = (tokens.page_N, tokens.positions_N % pages[0].shape[1])
        pages = (write_pages(pages[0], k_NKC, *place), write_pages(pages[1], v_NKU, *place))
        y_NKGU = self._attend(q_NKGC, pages, tokens)
        D = x_ND.shape[1]
        out_ND = sum_over_tensor(
            matmul(y_NKGU.reshape(len(x_ND), -1), self.out[...].reshape(-1, D))
        )
        if self.config.out_bias:
            out_ND = out_ND + self.out_bias[...]
        return out_ND, pages

    def _attend(self, q_NKGC: jax.Array, pages: Pages, tokens: Tokens) -> jax.Array:
        """Decode rows and chunk rows, each as one call over its own shape."""
        B = tokens.num_decode
        groups = [(q_NKGC[:B], slice(0, B), 1), (q_NKGC[B:], slice(B, None), tokens.chunk)]
        outs = [
            paged_attention(
                q.reshape(-1, length, *q.shape[1:]),
                *pages,
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

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        super().__init__(config, dtype)
        D, K, G, C = config.hidden_size, config.num_kv_heads, config.group_size, config.head_dim
        self.qkv = nnx.Param(jnp.zeros((D, K, G + 2, C), dtype))
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((K, G + 2, C), dtype))
        if config.qk_norm == "head":
            self.q_norm = nnx.Param(jnp.zeros((C,), dtype))
            self.k_norm = nnx.Param(jnp.zeros((C,), dtype))
        if config.qk_norm == "all":
            self.q_norm_all = nnx.Param(jnp.zeros((K, G, C), dtype))
            self.k_norm_all = nnx.Param(jnp.zeros((K, C), dtype))

    def project(
        self, x_ND: Float[Array, "N D"], angles: Angles
    ) -> tuple[Float[Array, "N K G C"], Float[Array, "N K C"], Float[Array, "N K C"]]:
        D, K, _, C = self.qkv.shape
        G, eps, offset = self.config.group_size, self.config.norm_eps, self.config.norm_offset
        qkv = matmul(x_ND, self.qkv[...].reshape(D, -1)).reshape(-1, K, G + 2, C)
        if self.config.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        q_NKGC, k_NKC, v_NKC = qkv[:, :, :G], qkv[:, :, G], qkv[:, :, G + 1]
        if self.config.qk_norm == "head":
            q_NKGC = rms_norm(q_NKGC, self.q_norm[...], eps, offset)
            k_NKC = rms_norm(k_NKC, self.k_norm[...], eps, offset)
        if self.config.qk_norm == "all":
            q_NKGC = _norm_all_heads(q_NKGC, self.q_norm_all[...], eps, offset)
            k_NKC = _norm_all_heads(k_NKC, self.k_norm_all[...], eps, offset)
        return (
            apply_rope(q_NKGC.reshape(-1, K * G, C), *angles).reshape(-1, K, G, C),
            apply_rope(k_NKC, *angles),
            v_NKC,
        )


def _norm_all_heads(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """RMS norm over all heads' channels at once, this device's and the others'."""
    x32 = x.astype(jnp.float32)
    axes = tuple(range(1, x.ndim))
    mean = mean_over_tensor(jnp.mean(x32 * x32, axis=axes, keepdims=True))
    return (x32 * jax.lax.rsqrt(mean + eps) * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
