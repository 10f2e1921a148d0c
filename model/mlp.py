"""The dense feed-forward block: a gated activation between two products.

It does not know layers or tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.config import ClampedSwiglu, ModelConfig
from model.kernel_choice import Kernels
from model.kernels import fused_matmul
from model.kernels.xla_matmul import Activate
from model.linear import Norm
from model.matrix import add_matrix, matrix
from model.projection import project_in, project_out


def activation(config: ModelConfig) -> Activate:
    """What makes a block's hidden numbers of gate and up, in float32."""
    match config.activation:
        case "silu":
            return lambda gate, up: jax.nn.silu(gate) * up
        case "gelu_tanh":
            return lambda gate, up: jax.nn.gelu(gate, approximate=True) * up
        case ClampedSwiglu(alpha, limit):

            def clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
                gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
                return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)

            return clamped


def activate(gate_up: Float[Array, "*N two F"], config: ModelConfig) -> Float[Array, "*N F"]:
    """The gate applied to up, in float32."""
    gate, up = (gate_up[..., part, :].astype(jnp.float32) for part in range(2))
    return activation(config)(gate, up).astype(gate_up.dtype)


class Mlp(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, kernels: Kernels) -> None:
        D, F = config.hidden_size, config.mlp_size
        self.config = config
        self.kernels = kernels
        add_matrix(self, "mlp.gate_up", (D, 2, F), config, dtype)
        add_matrix(self, "mlp.down", (F, D), config, dtype)
        if config.mlp_bias:
            self.gate_up_bias = nnx.Param(jnp.zeros((2, F), dtype))
            self.down_bias = nnx.Param(jnp.zeros((D,), dtype))

    def __call__(
        self,
        x_ND: Float[Array, "N D"],
        norm: Norm | None = None,
        residual_ND: Float[Array, "N D"] | None = None,
    ) -> Float[Array, "N D"]:
        """residual + the block's output for norm(x)."""
        gate_up, down, down_bias_D = matrix(self, "gate_up"), matrix(self, "down"), None
        if self.config.mlp_bias:
            bias, down_bias_D = self.gate_up_bias[...], self.down_bias[...]
            gate_up_N2F = project_in(self.kernels, x_ND, norm, gate_up, bias)
            hidden_NF = activate(gate_up_N2F, self.config)
        else:
            hidden_NF = fused_matmul(
                self.kernels,
                x_ND,
                gate_up,
                norm=norm,
                activate=activation(self.config),
            )
        return project_out(self.kernels, hidden_NF, down, down_bias_D, residual_ND)
