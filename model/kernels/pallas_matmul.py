"""Products of a few rows with a weight, fused with what stands around them, as one Pallas kernel.

Such a product takes as long as reading the weight, so a norm before it and an activation or a
residual after it cost a launch each and nothing else. It does not know layers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from model.kernels.tiles import LEAST_TILE, NUM_CORES, dot, load, power_of_two
from model.kernels.xla_matmul import Activate
from model.linear import Matrix, Norm

MOST_ROWS = 64
"""Beyond, a product takes longer to compute than its weight to read, and cuBLAS is better at it."""

DEPTH = 128
"""Rows of the weight per turn of the loop."""


def uncovered(x_ND: jax.Array) -> str:
    """Why the kernel can't take these shapes; empty when it can."""
    if x_ND.shape[1] % DEPTH:
        return f"weights of {x_ND.shape[1]} rows, no multiple of {DEPTH}"
    return ""


def fused_matmul(
    x_ND: Float[Array, "N D"],
    weight_DPF: Matrix,
    *,
    norm: Norm | None = None,
    activate: Activate | None = None,
    residual_NF: Float[Array, "N F"] | None = None,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """norm(x) @ weight, then `activate` of the P products, or their sum with `residual_NF`.

    As `model/kernels/xla_matmul.py`'s, where `uncovered` is empty. The norm's factor on a row is
    taken after the product: so x is rounded once, after the norm's weight, and sums are not.
    """
    N, (_, parts, F) = len(x_ND), weight_DPF.numbers.shape
    assert parts == (2 if activate else 1), "an activation takes two products"
    columns = next((c for c in (64, 32) if F // c >= NUM_CORES), 16)
    operands = [x_ND, weight_DPF.numbers]
    optional = (weight_DPF.scale, norm.weight if norm else None, residual_NF)
    operands += [operand for operand in optional if operand is not None]
    return pl.pallas_call(
        partial(
            _kernel,
            columns=columns,
            is_quantized=weight_DPF.scale is not None,
            norm=(norm.eps, norm.offset) if norm else None,
            activate=activate,
            has_residual=residual_NF is not None,
        ),
        out_shape=jax.ShapeDtypeStruct((N, F), x_ND.dtype),
        grid=(pl.cdiv(F, columns),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="fused_matmul",
    )(*operands)


def _kernel(
    x_ref,
    weight_ref,
    *refs,
    columns: int,
    is_quantized: bool,
    norm: tuple[float, float] | None,
    activate: Activate | None,
    has_residual: bool,
):
    refs = list(refs)
    scale_ref = refs.pop(0) if is_quantized else None
    norm_ref = refs.pop(0) if norm else None
    residual_ref = refs.pop(0) if has_residual else None
    (out_ref,) = refs
    (N, D), (_, parts, F) = x_ref.shape, weight_ref.shape
    rows = max(LEAST_TILE, power_of_two(N))
    row_X = lax.iota(jnp.int32, rows)
    column_F = pl.program_id(0) * columns + lax.iota(jnp.int32, columns)
    is_column = None if F % columns == 0 else jnp.broadcast_to(column_F < F, (DEPTH, columns))

    def visit(i, carry):
        squares_X, *sums_XF = carry
        depth_K = i * DEPTH + lax.iota(jnp.int32, DEPTH)
        x_place = (row_X[:, None], depth_K[None, :])
        x_XK = load(x_ref, x_place, jnp.broadcast_to(row_X[:, None] < N, (rows, DEPTH)))
        if norm_ref is not None and norm is not None:
            x32_XK = x_XK.astype(jnp.float32)
            squares_X = squares_X + (x32_XK * x32_XK).sum(axis=1)
            weight_K = plgpu.load(norm_ref.at[depth_K]).astype(jnp.float32) + norm[1]
            x_XK = (x32_XK * weight_K[None, :]).astype(x_XK.dtype)
        tiles_KF = (
            load(weight_ref, (depth_K[:, None], part, column_F[None, :]), is_column)
            for part in range(parts)
        )
        sums_XF = [
            sum_XF + dot(x_XK, tile_KF.astype(x_XK.dtype))
            for sum_XF, tile_KF in zip(sums_XF, tiles_KF, strict=True)
        ]
        return squares_X, *sums_XF

    zeros_XF = [jnp.zeros((rows, columns), jnp.float32)] * parts
    squares_X, *sums_XF = lax.fori_loop(
        0, D // DEPTH, visit, (jnp.zeros((rows,), jnp.float32), *zeros_XF)
    )
    if scale_ref is not None:
        in_weight = None if is_column is None else column_F < F
        sums_XF = [
            sum_XF * load(scale_ref, (part, column_F), in_weight)[None, :]
            for part, sum_XF in enumerate(sums_XF)
        ]
    if norm:
        scale_X = lax.rsqrt(squares_X / D + norm[0])
        sums_XF = [sum_XF * scale_X[:, None] for sum_XF in sums_XF]
    out_XF = activate(*sums_XF) if activate else sums_XF[0]
    mask = jnp.broadcast_to((row_X < N)[:, None] & (column_F < F)[None, :], (rows, columns))
    place = (row_X[:, None], column_F[None, :])
    if residual_ref is not None:
        out_XF = out_XF + load(residual_ref, place, mask).astype(jnp.float32)
    plgpu.store(out_ref.at[place], out_XF.astype(out_ref.dtype), mask=mask)
