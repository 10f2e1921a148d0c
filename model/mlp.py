"""The dense feed-forward block: a gated activation between two products.

It does not know layers or tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.config import ClampedSwiglu, ModelConfig
from model.linear import matmul
from sharding.collectives import sum_over_tensor


def activate(gate_up: Float[Array, "*N two F"], config: ModelConfig) -> Float[Array, "*N F"]:
    """The gate applied to up, in float32."""
    gate, up = gate_up[..., 0, :].astype(jnp.float32), gate_up[..., 1, :].astype(jnp.float32)
    match config.activation:
        case "silu":
            product = jax.nn.silu(gate) * up
        case "gelu_tanh":
            product = jax.nn.gelu(gate, approximate=True) * up
        case ClampedSwiglu(alpha, limit):
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            product = gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
    return product.astype(gate_up.dtype)


class Mlp(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        D, F = config.hidden_size, config.mlp_size
        self.config = config
        self.gate_up = nnx.Param(jnp.zeros((D, 2, F), dtype))
        self.down = nnx.Param(jnp.zeros((F, D), dtype))
        if config.mlp_bias:
            self.gate_up_bias = nnx.Param(jnp.zeros((2, F), dtype))
            self.down_bias = nnx.Param(jnp.zeros((D,), dtype))

    def __call__(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N D"]:
        D, _, F = self.gate_up.shape
        gate_up_N2F = matmul(x_ND, self.gate_up[...].reshape(D, 2 * F)).reshape(-1, 2, F)
        if self.config.mlp_bias:
            gate_up_N2F = gate_up_N2F + self.gate_up_bias[...]
        out_ND = sum_over_tensor(matmul(activate(gate_up_N2F, self.config), self.down[...]))
        return out_ND + self.down_bias[...] if self.config.mlp_bias else out_ND
