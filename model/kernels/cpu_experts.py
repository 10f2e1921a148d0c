"""Experts over the tokens that chose them on a CPU, in plain XLA.

It does not know routers or devices.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from model.kernels import xla_experts
from model.kernels.cpu_matmul import multiply, multiply_panels
from model.kernels.expert_tiles import combine, deal
from model.kernels.tiles import power_of_two
from model.kernels.xla_experts import Product, Weights, multiply_flat, together
from model.kernels.xla_matmul import Activate
from model.linear import Matrix

MOST_APART = 16
"""Experts whose weights are kept apart: each costs every layer a loop, and the step its arrays."""

FEWEST_ROWS, MOST_ROWS = 4, 16
"""Of a tile. Fewer take as long. Of more than 48 XLA (jaxlib 0.11.2) copies each panel first."""


def experts(
    x_ND: Float[Array, "N D"],
    routed_EN: Float[Array, "E N"],
    gate_up: Matrix | Sequence[Matrix],
    down: Matrix | Sequence[Matrix],
    *,
    top_k: int,
    activate: Activate,
    gate_up_bias_E2F: Float[Array, "E 2 F"] | None = None,
    down_bias_ED: Float[Array, "E D"] | None = None,
) -> Float[Array, "N D"]:
    """As `model/kernels/xla_experts.py`'s; or weights are apart, each expert's in panels [P, D, C].

    XLA on CPU copies a slice of a stacked weight before it multiplies with it.
    """
    E, N = routed_EN.shape
    tile = min(MOST_ROWS, max(FEWEST_ROWS, power_of_two(-(-N * top_k // E))))
    tiles = deal(routed_EN, top_k, tile)
    x_IXD = x_ND.at[tiles.token_IX].get(mode="fill", fill_value=0)
    biases = (gate_up_bias_E2F, down_bias_ED)

    def compute(product: Product, weights: Weights, i: jax.Array, out_IXD: jax.Array) -> jax.Array:
        return out_IXD.at[i].set(xla_experts.output(x_IXD[i], weights, activate, product))

    out_IXD = jnp.zeros_like(x_IXD)
    if isinstance(gate_up, Matrix):
        assert isinstance(down, Matrix), "all weights are apart, or none"
        stacked = together(gate_up, down, *biases)

        def compute_any(i: jax.Array, out_IXD: jax.Array) -> jax.Array:
            expert = (tiles.end_E <= i).sum()
            weights = jax.tree.map(lambda leaf: leaf[expert], stacked)
            return compute(partial(multiply_flat, multiply=multiply), weights, i, out_IXD)

        out_IXD = lax.fori_loop(0, tiles.end_E[-1], compute_any, out_IXD)
    else:
        assert not isinstance(down, Matrix), "all weights are apart, or none"
        for e in range(E):
            own = [None if bias is None else bias[e] for bias in biases]
            compute_own = partial(compute, multiply_panels, together(gate_up[e], down[e], *own))
            out_IXD = lax.fori_loop(tiles.first_E[e], tiles.end_E[e], compute_own, out_IXD)
    return combine(out_IXD.reshape(-1, x_ND.shape[1]), tiles)
