"""Self-attention of one layer over paged keys and values.

It does not know requests; `Tokens` says where each new token stands and where its keys go.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import Layer, ModelConfig
from model.kernels import paged_attention, write_pages
from model.linear import matmul, rms_norm
from model.rope import apply_rope, rope_angles
from sharding.collectives import mean_over_tensor, sum_over_tensor

NO_WINDOW = 2**30
"""A window wider than any context; windows are data, so that stages may differ in them."""

Pages = tuple[jax.Array, jax.Array]
"""One layer's keys and values, [P, page_size, K, C] each."""


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


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, layer: Layer, dtype: jnp.dtype) -> None:
        D, K, G, C = config.hidden_size, config.num_kv_heads, config.group_size, config.head_dim
        self.config = config
        self.qkv = nnx.Param(jnp.zeros((D, K, G + 2, C), dtype))
        self.out = nnx.Param(jnp.zeros((K, G, C, D), dtype))
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((K, G + 2, C), dtype))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros((D,), dtype))
        if config.qk_norm == "head":
            self.q_norm = nnx.Param(jnp.zeros((C,), dtype))
            self.k_norm = nnx.Param(jnp.zeros((C,), dtype))
        if config.qk_norm == "all":
            self.q_norm_all = nnx.Param(jnp.zeros((K, G, C), dtype))
            self.k_norm_all = nnx.Param(jnp.zeros((K, C), dtype))
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((K, G), dtype))
        self.inv_freq = Constant(jnp.zeros((C // 2,), jnp.float32))
        self.rope_factor = Constant(jnp.zeros((), jnp.float32))
        self.window = Constant(jnp.zeros((), jnp.int32))

    def __call__(
        self, x_ND: Float[Array, "N D"], pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "N D"], Pages]:
        """Attends over cached tokens and these; returns the block's output and the new pages."""
        q_NKGC, k_NKC, v_NKC = self._project(x_ND)
        angles = rope_angles(tokens.positions_N, self.inv_freq[...], self.rope_factor[...])
        N, K, G, C = q_NKGC.shape
        q_NKGC = apply_rope(q_NKGC.reshape(N, K * G, C), *angles).reshape(N, K, G, C)
        k_NKC = apply_rope(k_NKC, *angles)
        place = (tokens.page_N, tokens.positions_N % pages[0].shape[1])
        pages = (write_pages(pages[0], k_NKC, *place), write_pages(pages[1], v_NKC, *place))
        y_NKGC = self._attend(q_NKGC, pages, tokens)
        out_ND = sum_over_tensor(
            matmul(y_NKGC.reshape(N, K * G * C), self.out[...].reshape(K * G * C, -1))
        )
        if self.config.out_bias:
            out_ND = out_ND + self.out_bias[...]
        return out_ND, pages

    def _project(self, x_ND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [N, K, G, C], keys and values [N, K, C], normed but not rotated."""
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
        return q_NKGC, k_NKC, v_NKC

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
            ).reshape(q.shape)
            for q, rows, length in groups
            if q.shape[0]
        ]
        return jnp.concatenate(outs) if len(outs) > 1 else outs[0]


def _norm_all_heads(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """RMS norm over all heads' channels at once, this device's and the others'."""
    x32 = x.astype(jnp.float32)
    axes = tuple(range(1, x.ndim))
    mean = mean_over_tensor(jnp.mean(x32 * x32, axis=axes, keepdims=True))
    return (x32 * jax.lax.rsqrt(mean + eps) * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
