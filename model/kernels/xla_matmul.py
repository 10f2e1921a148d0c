"""A product with a weight and what stands around it, in plain XLA.

It does not know layers or devices.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from model.linear import Matrix, Norm, multiply, rms_norm

Activate = Callable[[jax.Array, jax.Array], jax.Array]
"""Of gate and up in float32."""


def fused_matmul(
    x_ND: Float[Array, "N D"],
    weight_DPF: Matrix,
    *,
    norm: Norm | None = None,
    activate: Activate | None = None,
    residual_NF: Float[Array, "N F"] | None = None,
    product: Callable[[jax.Array, Matrix], jax.Array] = multiply,
) -> Float[Array, "N F"]:
    """norm(x) @ weight, then `activate` of the P products, or their sum with `residual_NF`.

    The weight is [D, P, F], its scale [P, F]; P is 1, or 2 with `activate`. Each step's result is
    rounded to x's dtype.
    """
    N = x_ND.shape[0]
    _, parts, F = weight_DPF.numbers.shape
    assert parts == (2 if activate else 1), "an activation takes two products"
    if norm is not None:
        x_ND = rms_norm(x_ND, norm)
    out_NPF = product(x_ND, weight_DPF.flat()).reshape(N, parts, F)
    if activate:
        gate_NF, up_NF = (out_NPF[:, part].astype("float32") for part in range(2))
        return activate(gate_NF, up_NF).astype(x_ND.dtype)
    return out_NPF[:, 0] if residual_NF is None else residual_NF + out_NPF[:, 0]
