"""The mixture-of-experts block: a router, each device's experts over their tokens, shared experts.

It does not know how experts were dealt to devices beyond their order, or how theirs are computed
(`model/kernels`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from model.config import Experts, ModelConfig
from model.kernel_choice import Kernels
from model.kernels import experts, fused_matmul
from model.linear import Norm, matmul, rms_norm
from model.matrix import add_matrices, add_matrix, matrices, matrix, num_matrices
from model.mlp import activation
from sharding.collectives import sum_over_tensor, tensor_index

ALL_ZERO = 1e-20
"""Added where weights are made to sum to one: sigmoids of all the chosen may round to zero."""


def route(
    logits_NE: Float[Array, "N E"],
    experts: Experts,
    selection_bias_E: Float[Array, " E"] | None = None,
) -> Float[Array, "N E"]:
    """Each token's weight on each expert, zero on all but its `top_k`; float32."""
    score = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[experts.scoring]
    scores_NE = score(logits_NE.astype(jnp.float32))
    ranked_NE = scores_NE if selection_bias_E is None else scores_NE + selection_bias_E
    if experts.top_groups < experts.num_groups:
        ranked_NE = _in_best_groups(ranked_NE, experts)
    _, chosen_NA = lax.top_k(ranked_NE, experts.top_k)
    top_NA = jnp.take_along_axis(scores_NE, chosen_NA, axis=1)
    if experts.normalize:
        top_NA = top_NA / (top_NA.sum(-1, keepdims=True) + ALL_ZERO)
    rows_N1 = jnp.arange(scores_NE.shape[0])[:, None]
    return jnp.zeros_like(scores_NE).at[rows_N1, chosen_NA].set(experts.scale * top_NA)


def _in_best_groups(ranked_NE: jax.Array, experts: Experts) -> jax.Array:
    """-inf on the experts outside of each token's best groups."""
    N, E = ranked_NE.shape
    grouped = ranked_NE.reshape(N, experts.num_groups, -1)
    two_best, _ = lax.top_k(grouped, 2)
    _, best = lax.top_k(two_best.sum(-1), experts.top_groups)
    open_ = jnp.zeros(grouped.shape[:2], bool).at[jnp.arange(N)[:, None], best].set(True)
    return jnp.where(open_[..., None], grouped, -jnp.inf).reshape(N, E)


class Moe(nnx.Module):
    """`config.experts` counts pieces: a mesh wider than the experts splits each by its width."""

    def __init__(
        self, config: ModelConfig, num_routed: int, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        experts = config.experts
        assert experts is not None, "a layer of experts in a configuration without experts"
        D, E, F = config.hidden_size, experts.num_experts, experts.size
        self.config = config
        self.kernels = kernels
        self.router = nnx.Param(jnp.zeros((D, num_routed), dtype))
        add_matrices(self, "moe.gate_up", (E, D, 2, F), config, dtype, kernels)
        add_matrices(self, "moe.down", (E, F, D), config, dtype, kernels)
        if experts.bias:
            self.router_bias = nnx.Param(jnp.zeros((num_routed,), dtype))
            self.gate_up_bias = nnx.Param(jnp.zeros((E, 2, F), dtype))
            self.down_bias = nnx.Param(jnp.zeros((E, D), dtype))
        if experts.selection_bias:
            self.selection_bias = nnx.Param(jnp.zeros((num_routed,), jnp.float32))
        if experts.shared_size:
            shared = experts.shared_size
            add_matrix(self, "moe.shared_gate_up", (D, 2, shared), config, dtype)
            add_matrix(self, "moe.shared_down", (shared, D), config, dtype)

    def __call__(
        self,
        x_ND: Float[Array, "N D"],
        norm: Norm | None = None,
        residual_ND: Float[Array, "N D"] | None = None,
    ) -> Float[Array, "N D"]:
        """residual + the block's output for norm(x)."""
        out_ND = self._compute(x_ND if norm is None else rms_norm(x_ND, norm))
        return out_ND if residual_ND is None else residual_ND + out_ND

    def _compute(self, x_ND: jax.Array) -> jax.Array:
        config = self.config.experts
        assert config is not None, "a layer of experts in a configuration without experts"
        # In float32, since the last bit may decide between two experts.
        x32_ND, router_DE = x_ND.astype(jnp.float32), self.router[...].astype(jnp.float32)
        logits_NE = matmul(x32_ND, router_DE)
        if config.bias:
            logits_NE = logits_NE + self.router_bias[...]
        selection_bias_E = self.selection_bias[...] if config.selection_bias else None
        routed_NE = route(logits_NE, config, selection_bias_E)
        sum_ND = experts(
            self.kernels,
            x_ND,
            self._local(routed_NE, config.num_experts),
            matrices(self, "gate_up"),
            matrices(self, "down"),
            top_k=config.top_k,
            activate=activation(self.config),
            gate_up_bias_E2F=self.gate_up_bias[...] if config.bias else None,
            down_bias_ED=self.down_bias[...] if config.bias else None,
        )
        if config.shared_size:
            sum_ND = sum_ND + self._shared(x_ND).astype(jnp.float32)
        return sum_over_tensor(sum_ND).astype(x_ND.dtype)

    def _shared(self, x_ND: jax.Array) -> jax.Array:
        """This device's part of what every token passes."""
        gate_up, down = matrix(self, "shared_gate_up"), matrix(self, "shared_down")
        hidden_NF = fused_matmul(self.kernels, x_ND, gate_up, activate=activation(self.config))
        return fused_matmul(self.kernels, hidden_NF, down.as_product())

    def _local(self, routed_NE: jax.Array, num_pieces: int) -> jax.Array:
        """The rows [E, N] of this device's experts, or pieces of experts."""
        num_local = num_matrices(self, "gate_up")
        routed_NE = jnp.repeat(routed_NE, num_pieces // routed_NE.shape[1], axis=1)
        return lax.dynamic_slice_in_dim(routed_NE, tensor_index() * num_local, num_local, 1).T
