"""Experts over the tokens that chose them on a CPU, in plain XLA.

It does not know routers or devices.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from model.kernels import xla_experts
from model.kernels.cpu_matmul import multiply_int8
from model.kernels.expert_tiles import combine, deal
from model.kernels.tiles import power_of_two
from model.kernels.xla_experts import Product, Weights, multiply_flat, together
from model.kernels.xla_matmul import Activate
from model.linear import Matrix, multiply

MOST_APART = 16
"""Experts whose weights are kept apart: each costs every layer a loop, and the step its arrays."""

COLUMNS = 64
"""Of a panel. Products of few rows read a weight 64 columns at a time, and where it is wider jump
to another page for each of its rows: they then take up to twice as long."""

FEWEST_ROWS, MOST_ROWS = 4, 16
"""Of a tile. Fewer take as long. Of more than 48 XLA (jaxlib 0.11.2) copies each panel first."""


def panels[Numbers: (jax.Array, np.ndarray)](weight_DF: Numbers) -> Numbers:
    """One expert's gate_up, [D, 2, F], or down, [F, D], as `experts` takes it apart: [P, D, C].

    Of int8 it is one panel: that is copied at each product anyway.
    """
    depth = weight_DF.shape[0]
    width = weight_DF.size // depth
    fits = width % COLUMNS == 0 and weight_DF.dtype != jnp.int8
    return weight_DF.reshape(depth, -1, COLUMNS if fits else width).swapaxes(0, 1)


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
    """As `model/kernels/xla_experts.py`'s, or with weights apart: one of each expert, in `panels`.

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
            return compute(partial(multiply_flat, multiply=_multiply), weights, i, out_IXD)

        out_IXD = lax.fori_loop(0, tiles.end_E[-1], compute_any, out_IXD)
    else:
        assert not isinstance(down, Matrix), "all weights are apart, or none"
        for e in range(E):
            own = [None if bias is None else bias[e] for bias in biases]
            compute_own = partial(compute, _multiply_panels, together(gate_up[e], down[e], *own))
            out_IXD = lax.fori_loop(tiles.first_E[e], tiles.end_E[e], compute_own, out_IXD)
    return combine(out_IXD.reshape(-1, x_ND.shape[1]), tiles)


def _multiply_panels(x_XD: jax.Array, weight: Matrix) -> jax.Array:
    def multiply_panel(x_XD: jax.Array, numbers_DC: jax.Array, scale_C: jax.Array | None):
        return _multiply(x_XD, Matrix(numbers_DC, scale_C))

    P, _, C = weight.numbers.shape
    x_PXD = jnp.broadcast_to(x_XD, (P, *x_XD.shape))
    scale_PC = None if weight.scale is None else weight.scale.reshape(P, C)
    out_PXC = jax.vmap(multiply_panel)(x_PXD, weight.numbers, scale_PC)
    return out_PXC.swapaxes(0, 1).reshape(len(x_XD), P * C)


def _multiply(x_XD: jax.Array, weight: Matrix) -> jax.Array:
    is_int8 = weight.numbers.dtype == jnp.int8
    return (multiply_int8 if is_int8 else multiply)(x_XD, weight)
