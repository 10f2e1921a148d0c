"""This device's experts, one after the other over all tokens, in plain XLA.

An expert's output counts with a weight of zero where it wasn't chosen. It does not know routers or
devices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from model.kernels.xla_matmul import Activate
from model.linear import Matrix, multiply

Product = Callable[[jax.Array, Matrix], jax.Array]
"""Of x, [N, D], and a weight: their product, [N, F]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """One expert's; several experts' have an axis more in front."""

    gate_up: jax.Array
    gate_up_scale: jax.Array | None
    down: jax.Array
    down_scale: jax.Array | None
    gate_up_bias: jax.Array | None
    down_bias: jax.Array | None


def experts(
    x_ND: Float[Array, "N D"],
    routed_EN: Float[Array, "E N"],
    gate_up: Matrix,
    down: Matrix,
    *,
    activate: Activate,
    gate_up_bias_E2F: Float[Array, "E 2 F"] | None = None,
    down_bias_ED: Float[Array, "E D"] | None = None,
) -> Float[Array, "N D"]:
    """The sum of the experts' outputs, each token's weighted by `routed_EN`; float32.

    gate_up is [E, D, 2, F] and down [E, F, D]; each step's result is rounded to x's dtype.
    """

    def add_expert(sum_ND: jax.Array, expert: tuple[jax.Array, Weights]):
        routed_N, weights = expert
        out_ND = output(x_ND, weights, activate, multiply_flat)
        return sum_ND + routed_N[:, None] * out_ND.astype(jnp.float32), None

    weights = together(gate_up, down, gate_up_bias_E2F, down_bias_ED)
    start_ND = jnp.zeros(x_ND.shape, jnp.float32)
    return lax.scan(add_expert, start_ND, (routed_EN, weights))[0]


def together(
    gate_up: Matrix, down: Matrix, gate_up_bias: jax.Array | None, down_bias: jax.Array | None
) -> Weights:
    return Weights(
        gate_up.numbers, gate_up.scale, down.numbers, down.scale, gate_up_bias, down_bias
    )


def output(
    x_ND: Float[Array, "N D"], weights: Weights, activate: Activate, product: Product
) -> Float[Array, "N D"]:
    """One expert's, of all rows of x."""
    gate_up = Matrix(weights.gate_up, weights.gate_up_scale)
    hidden_N2F = product(x_ND, gate_up).reshape(len(x_ND), 2, -1)
    if weights.gate_up_bias is not None:
        hidden_N2F = hidden_N2F + weights.gate_up_bias
    gate_NF, up_NF = (hidden_N2F[:, part].astype(jnp.float32) for part in range(2))
    hidden_NF = activate(gate_NF, up_NF).astype(x_ND.dtype)
    out_ND = product(hidden_NF, Matrix(weights.down, weights.down_scale))
    return out_ND if weights.down_bias is None else out_ND + weights.down_bias


def multiply_flat(x_ND: jax.Array, weight: Matrix, multiply: Product = multiply) -> jax.Array:
    """x @ weight, [D, ...], as [N, F]."""
    scale = None if weight.scale is None else weight.scale.reshape(-1)
    return multiply(x_ND, Matrix(weight.numbers.reshape(len(weight.numbers), -1), scale))
