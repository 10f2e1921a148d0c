"""Products in which activations are rounded to the weight's 8 bits too, in plain XLA.

A tensor core multiplies such numbers twice as fast as bfloat16. It costs quality, and so is taken
only where it is asked for. It does not know layers or devices.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from model.kernels import xla_matmul
from model.linear import Matrix

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""By the dtypes of weights, the number that the largest of a row becomes."""


def uncovered(weight: Matrix) -> str:
    """Why the kernel can't take this weight; empty when it can."""
    dtype = weight.numbers.dtype
    return "" if dtype in LARGEST else f"weights in {dtype.name}, as a head's always are"


def fused_matmul(
    x_ND: Float[Array, "N D"], weight_DPF: Matrix, **around: Any
) -> Float[Array, "N F"]:
    """As `model/kernels/xla_matmul.py`'s, where `uncovered` is empty."""
    return xla_matmul.fused_matmul(x_ND, weight_DPF, product=multiply, **around)


def multiply(x_ND: Float[Array, "N D"], weight: Matrix) -> Float[Array, "N F"]:
    """x @ weight, [D, F]; each row of x is rounded with a scale of its own."""
    dtype = weight.numbers.dtype
    x32_ND = x_ND.astype(jnp.float32)
    step_N1 = jnp.max(jnp.abs(x32_ND) / LARGEST[dtype], axis=1, keepdims=True)
    steps_ND = jnp.where(step_N1 > 0, x32_ND / step_N1, 0)
    is_int8 = dtype == jnp.int8
    rounded_ND = (jnp.round(steps_ND) if is_int8 else steps_ND).astype(dtype)
    wide = jnp.int32 if is_int8 else jnp.float32
    sums_NF = jnp.matmul(rounded_ND, weight.numbers, preferred_element_type=wide)
    out_NF = sums_NF.astype(jnp.float32) * step_N1
    return (out_NF if weight.scale is None else out_NF * weight.scale).astype(x_ND.dtype)
