"""Products on a CPU, in plain XLA.

It does not know layers or devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model import linear
from model.kernels import xla_matmul
from model.linear import Matrix

LARGEST = 127
"""Of an int8, but for its least."""
PART = 2 * LARGEST
"""How many of the second part's steps one of the first's is: it has half of one to say."""
TINY = 1e-30
"""The least step: a row of zeros is divided by it."""


def fused_matmul(
    x_ND: Float[Array, "N D"], weight_DPF: Matrix, **around: Any
) -> Float[Array, "N F"]:
    """As `model/kernels/xla_matmul.py`'s.

    XLA on CPU (jaxlib 0.11.2) reads the weight of a product with one row in bfloat16 at 1.4 GB/s,
    of one with two rows at 12: one row is computed as two.
    """
    if weight_DPF.numbers.dtype == jnp.int8:
        return xla_matmul.fused_matmul(x_ND, weight_DPF, product=multiply_int8, **around)
    if x_ND.shape[0] > 1 or x_ND.dtype != jnp.bfloat16:
        return xla_matmul.fused_matmul(x_ND, weight_DPF, **around)
    if around.get("residual_NF") is not None:
        around["residual_NF"] = _two_rows(around["residual_NF"])
    return xla_matmul.fused_matmul(_two_rows(x_ND), weight_DPF, **around)[:1]


def multiply(x_ND: Float[Array, "N D"], weight: Matrix) -> Float[Array, "N F"]:
    """x @ weight, [D, F]."""
    is_int8 = weight.numbers.dtype == jnp.int8
    return (multiply_int8 if is_int8 else linear.multiply)(x_ND, weight)


def multiply_panels(x_ND: Float[Array, "N D"], weight: Matrix) -> Float[Array, "N F"]:
    """x @ weight, whose numbers are in panels, [P, D, C]."""

    def multiply_panel(x_ND: jax.Array, numbers_DC: jax.Array, scale_C: jax.Array | None):
        return multiply(x_ND, Matrix(numbers_DC, scale_C))

    P, _, C = weight.numbers.shape
    # One x for all would make XLA join the panels to a single weight, in memory.
    x_PND = jnp.broadcast_to(x_ND, (P, *x_ND.shape))
    scale_PC = None if weight.scale is None else weight.scale.reshape(P, C)
    out_PNC = jax.vmap(multiply_panel)(x_PND, weight.numbers, scale_PC)
    return out_PNC.swapaxes(0, 1).reshape(len(x_ND), P * C)


def multiply_int8(x_ND: Float[Array, "N D"], weight: Matrix) -> Float[Array, "N F"]:
    """x @ weight, whose numbers are int8.

    XLA on CPU turns such numbers into floating ones in memory, but multiplies int8 with int8
    faster than floats: so x's numbers become two int8 each, of 15 bits together, and their products
    are exact.
    """
    N, x32_ND = x_ND.shape[0], x_ND.astype(jnp.float32)
    step_N1 = jnp.maximum(jnp.max(jnp.abs(x32_ND), axis=1, keepdims=True) / LARGEST, TINY)
    steps_ND = x32_ND / step_N1
    high_ND = jnp.round(steps_ND)
    low_ND = jnp.round((steps_ND - high_ND) * PART)
    parts_MD = jnp.concatenate([high_ND, low_ND]).astype(jnp.int8)
    sums_MF = jnp.matmul(parts_MD, weight.numbers, preferred_element_type=jnp.int32)
    sums_MF = sums_MF.astype(jnp.float32)
    out_NF = (sums_MF[:N] + sums_MF[N:] / PART) * step_N1
    return (out_NF if weight.scale is None else out_NF * weight.scale).astype(x_ND.dtype)


def _two_rows(x_1D: jax.Array) -> jax.Array:
    return jnp.pad(x_1D, ((0, 1), (0, 0)))
