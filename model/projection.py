"""The products between a layer's residual stream and its blocks, with what is fused to them.

It does not know what a block computes.
"""

import jax
from jaxtyping import Array, Float

from model.kernel_choice import Kernels
from model.kernels import fused_matmul
from model.linear import Matrix, Norm
from sharding.collectives import num_tensor, sum_over_tensor


def project_in(
    kernels: Kernels,
    x_ND: Float[Array, "N D"],
    norm: Norm | None,
    weight: Matrix,
    bias: Float[Array, "*F"] | None = None,
) -> Float[Array, "N *F"]:
    """norm(x) @ weight [D, *F] + bias: this device's heads or channels."""
    _, *shape = weight.numbers.shape
    out = fused_matmul(kernels, x_ND, weight.as_product(), norm=norm)
    out = out.reshape(-1, *shape)
    return out if bias is None else out + bias


def project_out(
    kernels: Kernels,
    y: Float[Array, "N *F"],
    weight: Matrix,
    bias_D: Float[Array, " D"] | None = None,
    residual_ND: Float[Array, "N D"] | None = None,
) -> Float[Array, "N D"]:
    """residual + y @ weight [*F, D] + bias, summed over the devices that hold parts of y."""
    y_NF = y.reshape(y.shape[0], -1)
    weight_F1D = weight.as_product(num_summed=weight.numbers.ndim - 1)
    if num_tensor() == 1 and bias_D is None:
        return fused_matmul(kernels, y_NF, weight_F1D, residual_NF=residual_ND)
    out_ND: jax.Array = sum_over_tensor(fused_matmul(kernels, y_NF, weight_F1D))
    out_ND = out_ND if bias_D is None else out_ND + bias_D
    return out_ND if residual_ND is None else residual_ND + out_ND
