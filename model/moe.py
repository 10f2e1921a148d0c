"""The mixture-of-experts block: a router, and each device's experts over all tokens.

This is the plain path: every expert sees every token, weighted by zero where it wasn't chosen. It
does not know how experts were dealt to devices beyond their order.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from model.config import Experts, ModelConfig
from model.linear import matmul
from model.mlp import activate
from sharding.collectives import sum_over_tensor, tensor_index


def route(logits_NE: Float[Array, "N E"], experts: Experts) -> Float[Array, "N E"]:
    """Each token's weight on each expert, zero on all but its `top_k`; float32."""
    scores_NE = jax.nn.softmax(logits_NE.astype(jnp.float32), axis=-1)
    top_NA, chosen_NA = lax.top_k(scores_NE, experts.top_k)
    if experts.normalize:
        top_NA = top_NA / top_NA.sum(-1, keepdims=True)
    rows_N1 = jnp.arange(scores_NE.shape[0])[:, None]
    return jnp.zeros_like(scores_NE).at[rows_N1, chosen_NA].set(top_NA)


class Moe(nnx.Module):
    """`config.experts` counts pieces: a mesh wider than the experts splits each by its width."""

    def __init__(self, config: ModelConfig, num_routed: int, dtype: jnp.dtype) -> None:
        experts = config.experts
        assert experts is not None, "a layer of experts in a configuration without experts"
        D, E, F = config.hidden_size, experts.num_experts, experts.size
        self.config = config
        self.router = nnx.Param(jnp.zeros((D, num_routed), dtype))
        self.gate_up = nnx.Param(jnp.zeros((E, D, 2, F), dtype))
        self.down = nnx.Param(jnp.zeros((E, F, D), dtype))
        if experts.bias:
            self.router_bias = nnx.Param(jnp.zeros((num_routed,), dtype))
            self.gate_up_bias = nnx.Param(jnp.zeros((E, 2, F), dtype))
            self.down_bias = nnx.Param(jnp.zeros((E, D), dtype))

    def __call__(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N D"]:
        experts = self.config.experts
        assert experts is not None, "a layer of experts in a configuration without experts"
        logits_NE = matmul(x_ND, self.router[...])
        weights = [self.gate_up[...], self.down[...]]
        if experts.bias:
            logits_NE = logits_NE + self.router_bias[...]
            weights += [self.gate_up_bias[...], self.down_bias[...]]
        routed_EN = self._local(route(logits_NE, experts), experts.num_experts)

        def add_expert(sum_ND: jax.Array, expert: tuple[jax.Array, list[jax.Array]]):
            routed_N, (gate_up_D2F, down_FD, *bias) = expert
            D, _, F = gate_up_D2F.shape
            hidden_N2F = matmul(x_ND, gate_up_D2F.reshape(D, 2 * F)).reshape(-1, 2, F)
            if bias:
                hidden_N2F = hidden_N2F + bias[0]
            out_ND = matmul(activate(hidden_N2F, self.config), down_FD)
            if bias:
                out_ND = out_ND + bias[1]
            return sum_ND + routed_N[:, None] * out_ND.astype(jnp.float32), None

        start_ND = jnp.zeros(x_ND.shape, jnp.float32)
        sum_ND, _ = lax.scan(add_expert, start_ND, (routed_EN, weights))
        return sum_over_tensor(sum_ND).astype(x_ND.dtype)

    def _local(self, routed_NE: jax.Array, num_pieces: int) -> jax.Array:
        """The rows [E, N] of this device's experts, or pieces of experts."""
        num_local = self.gate_up.shape[0]
        routed_NE = jnp.repeat(routed_NE, num_pieces // routed_NE.shape[1], axis=1)
        return lax.dynamic_slice_in_dim(routed_NE, tensor_index() * num_local, num_local, 1).T
