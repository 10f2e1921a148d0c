"""Experts over the tokens that chose them, as two grouped products by one Pallas kernel.

The first gathers a tile's rows of x, multiplies them with their expert's gate and up and activates;
the second multiplies what comes of it with down. It does not know routers or devices.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from model.kernels.expert_tiles import Tiles, combine, deal
from model.kernels.tiles import LEAST_TILE, NUM_CORES, beyond_offsets, dot, load, power_of_two
from model.kernels.xla_matmul import Activate
from model.linear import Matrix

MOST_ROWS = 64
"""Of a tile: with more, the sums of gate and up don't fit a multiprocessor's registers."""

DEPTH = 64
"""Rows of a weight per turn of the loop."""


def uncovered(gate_up: Matrix, down: Matrix) -> str:
    """Why the kernel can't take these shapes; empty when it can."""
    for numbers in (gate_up.numbers, down.numbers):
        if numbers.shape[1] % DEPTH:
            return f"experts' weights of {numbers.shape[1]} rows, no multiple of {DEPTH}"
        if beyond_offsets(numbers):
            return f"experts' weights of {numbers.size:,} numbers in {numbers.dtype.name}"
    return ""


def experts(
    x_ND: Float[Array, "N D"],
    routed_EN: Float[Array, "E N"],
    gate_up: Matrix,
    down: Matrix,
    *,
    top_k: int,
    activate: Activate,
    gate_up_bias_E2F: Float[Array, "E 2 F"] | None = None,
    down_bias_ED: Float[Array, "E D"] | None = None,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """As `model/kernels/xla_experts.py`'s, where `uncovered` is empty.

    Gate and up are not rounded before they are activated.
    """
    (E, N), D = routed_EN.shape, x_ND.shape[1]
    tile = min(MOST_ROWS, max(LEAST_TILE, power_of_two(-(-N * top_k // E))))
    tiles = deal(routed_EN, top_k, tile)
    multiply = partial(_multiply, tiles, num_tokens=N, busy=min(E, N * top_k), interpret=interpret)
    hidden_MF = multiply(
        x_ND, gate_up.numbers, gate_up.scale, gate_up_bias_E2F, activate=activate, is_gathered=True
    )
    scale_E1D, bias_E1D = (
        None if array is None else array.reshape(E, 1, D) for array in (down.scale, down_bias_ED)
    )
    numbers_EF1D = down.numbers.reshape(E, -1, 1, D)
    out_MD = multiply(hidden_MF, numbers_EF1D, scale_E1D, bias_E1D)
    return combine(out_MD, tiles)


def _multiply(
    tiles: Tiles,
    x_RK: jax.Array,
    weight_EKPF: jax.Array,
    scale_EPF: jax.Array | None,
    bias_EPF: jax.Array | None,
    *,
    num_tokens: int,
    busy: int,
    interpret: bool,
    activate: Activate | None = None,
    is_gathered: bool = False,
) -> jax.Array:
    """Each row of the tiles @ its expert's weight, [M, F]; rows that are nobody's are not written.

    Of tokens, x is gathered; otherwise it is of the tiles' rows. `busy` experts at most have any.
    """
    num_tiles, tile = tiles.token_IX.shape
    F = weight_EKPF.shape[3]
    columns = next((c for c in (64, 32) if busy * F // c >= NUM_CORES), 16)
    optional = [array for array in (scale_EPF, bias_EPF) if array is not None]
    return pl.pallas_call(
        partial(
            _kernel,
            num_tokens=num_tokens,
            columns=columns,
            is_gathered=is_gathered,
            is_quantized=scale_EPF is not None,
            has_bias=bias_EPF is not None,
            activate=activate,
        ),
        out_shape=jax.ShapeDtypeStruct((num_tiles * tile, F), x_RK.dtype),
        grid=(num_tiles, pl.cdiv(F, columns)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="experts",
    )(x_RK, tiles.token_IX, tiles.end_E, weight_EKPF, *optional)


def _kernel(
    x_ref: Any,
    token_ref: Any,
    end_ref: Any,
    weight_ref: Any,
    *refs: Any,
    num_tokens: int,
    columns: int,
    is_gathered: bool,
    is_quantized: bool,
    has_bias: bool,
    activate: Activate | None,
) -> None:
    left = list(refs)
    scale_ref = left.pop(0) if is_quantized else None
    bias_ref = left.pop(0) if has_bias else None
    (out_ref,) = left
    (E, K, parts, F), (_, tile) = weight_ref.shape, token_ref.shape

    i = pl.program_id(0)
    slot_X = lax.iota(jnp.int32, tile)
    token_X = plgpu.load(token_ref.at[i, slot_X])
    slot_X = i * tile + slot_X
    row_X, is_row_X = token_X if is_gathered else slot_X, token_X < num_tokens
    place_E = lax.iota(jnp.int32, power_of_two(E))
    end_E = plgpu.load(end_ref.at[place_E], mask=place_E < E, other=jnp.iinfo(jnp.int32).max)
    expert = (end_E <= i).astype(jnp.int32).sum()
    # Tiles that are left over come after the last expert's.
    num_turns = (expert < E).astype(jnp.int32) * (K // DEPTH)
    expert = jnp.minimum(expert, E - 1)

    column_F = pl.program_id(1) * columns + lax.iota(jnp.int32, columns)
    is_column_F = None if F % columns == 0 else column_F < F
    is_column = None if is_column_F is None else jnp.broadcast_to(is_column_F, (DEPTH, columns))

    def visit(turn: jax.Array, sums_XF: list[jax.Array]) -> list[jax.Array]:
        depth_K = turn * DEPTH + lax.iota(jnp.int32, DEPTH)
        is_row = jnp.broadcast_to(is_row_X[:, None], (tile, DEPTH))
        x_XK = load(x_ref, (row_X[:, None], depth_K[None, :]), is_row)
        tiles_KF = (
            load(weight_ref, (expert, depth_K[:, None], part, column_F[None, :]), is_column)
            for part in range(parts)
        )
        return [
            sum_XF + dot(x_XK, tile_KF.astype(x_XK.dtype))
            for sum_XF, tile_KF in zip(sums_XF, tiles_KF, strict=True)
        ]

    zeros_XF = [jnp.zeros((tile, columns), jnp.float32)] * parts
    sums_XF = lax.fori_loop(0, num_turns, visit, zeros_XF)
    for part in range(parts):
        if scale_ref is not None:
            sums_XF[part] *= load(scale_ref, (expert, part, column_F), is_column_F)
        if bias_ref is not None:
            bias_F = load(bias_ref, (expert, part, column_F), is_column_F)
            sums_XF[part] += bias_F.astype(jnp.float32)
    out_XF = activate(*sums_XF) if activate else sums_XF[0]
    mask = jnp.broadcast_to(is_row_X[:, None] & (column_F < F)[None, :], (tile, columns))
    place = (slot_X[:, None], column_F[None, :])
    plgpu.store(out_ref.at[place], out_XF.astype(out_ref.dtype), mask=mask)
