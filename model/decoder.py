"""The one decoder: embedding, layers of attention and feed-forward blocks, and a head.

Built for one mesh (`model/partition.py`), it sees one device's shard of the weights and this
stage's layers. It does not know requests, sampling, or which micro-batch it is given.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.attention import Attention, Tokens
from model.config import Layer, ModelConfig
from model.kernel_choice import Kernels
from model.latent_attention import LatentAttention
from model.linear import Matrix, Norm, matmul, rms_norm
from model.mlp import Mlp
from model.moe import Moe
from model.pages import Pages
from model.projection import project_in
from sharding.collectives import gather_vocab, sum_over_vocab, vocab_shard_index


class DecoderLayer(nnx.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer: Layer,
        num_routed: int,
        dtype: jnp.dtype,
        kernels: Kernels,
    ) -> None:
        self.config = config
        if config.latent:
            self.attention = LatentAttention(config, config.latent, dtype, kernels)
        else:
            self.attention = Attention(config, dtype, kernels)
        if layer.experts:
            self.moe = Moe(config, num_routed, dtype, kernels)
        else:
            self.mlp = Mlp(config, dtype, kernels)
        for place in norm_names(config):
            setattr(self, place, nnx.Param(jnp.zeros((config.hidden_size,), dtype)))

    def __call__(self, x_ND: jax.Array, pages: Pages, tokens: Tokens) -> tuple[jax.Array, Pages]:
        before, after = self._norm("attention_norm"), self._norm("attention_post_norm")
        residual_ND = None if after else x_ND
        y_ND, pages = self.attention(x_ND, before, residual_ND, pages, tokens)
        x_ND = x_ND + rms_norm(y_ND, after) if after else y_ND

        before, after = self._norm("mlp_norm"), self._norm("mlp_post_norm")
        residual_ND = None if after else x_ND
        feed_forward = self.moe if hasattr(self, "moe") else self.mlp
        y_ND = feed_forward(x_ND, before, residual_ND)
        return x_ND + rms_norm(y_ND, after) if after else y_ND, pages

    def _norm(self, place: str) -> Norm | None:
        """The norm at `place`, where the configuration has one."""
        if not hasattr(self, place):
            return None
        return Norm(getattr(self, place)[...], self.config.norm_eps, self.config.norm_offset)


def norm_names(config: ModelConfig) -> tuple[str, ...]:
    """The norms a layer has."""
    before = ("attention_norm", "mlp_norm")
    after = ("attention_post_norm", "mlp_post_norm")
    return {"pre": before, "post": after, "both": before + after}[config.norm_placement]


class Decoder(nnx.Module):
    """`layers` are one stage's; of a padded vocabulary, `config` says what is real."""

    def __init__(
        self,
        config: ModelConfig,
        layers: tuple[Layer, ...],
        padded_vocab: int,
        num_routed: int,
        dtype: jnp.dtype,
        kernels: Kernels,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.embedding = nnx.Param(jnp.zeros((padded_vocab, config.hidden_size), dtype))
        self.layers = nnx.List(
            [DecoderLayer(config, layer, num_routed, dtype, kernels) for layer in layers]
        )
        self.final_norm = nnx.Param(jnp.zeros((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.head = nnx.Param(jnp.zeros((config.hidden_size, padded_vocab), dtype))

    def embed(self, tokens_N: Int[Array, "N"]) -> Float[Array, "N D"]:
        table_VD = self.embedding[...]
        local_N = tokens_N - vocab_shard_index() * table_VD.shape[0]
        here_N = (local_N >= 0) & (local_N < table_VD.shape[0])
        x_ND = jnp.where(here_N[:, None], table_VD[jnp.where(here_N, local_N, 0)], 0)
        return sum_over_vocab(x_ND) * jnp.asarray(self.config.embedding_scale, x_ND.dtype)

    def run(
        self, x_ND: Float[Array, "N D"], pages: list[Pages], tokens: Tokens
    ) -> tuple[Float[Array, "N D"], list[Pages]]:
        """This stage's layers."""
        written: list[Pages] = []
        for layer, layer_pages in zip(self.layers, pages, strict=True):
            x_ND, layer_pages = layer(x_ND, layer_pages, tokens)
            written.append(layer_pages)
        return x_ND, written

    def logits(self, x_RD: Float[Array, "R D"]) -> Float[Array, "R V"]:
        """Float32 logits over the whole vocabulary, on every device."""
        norm = Norm(self.final_norm[...], self.config.norm_eps, self.config.norm_offset)
        if self.config.tie_embeddings:
            # Not through a kernel, for which the table would have to be turned in memory.
            logits_RV = matmul(rms_norm(x_RD, norm), self.embedding[...].T)
        else:
            logits_RV = project_in(self.kernels, x_RD, norm, Matrix(self.head[...]))
        logits_RV = logits_RV.astype(jnp.float32)
        if self.config.logit_softcap is not None:
            cap = self.config.logit_softcap
            logits_RV = cap * jnp.tanh(logits_RV / cap)
        return gather_vocab(logits_RV)[:, : self.config.vocab_size]
