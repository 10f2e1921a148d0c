"""Norm and rotation of queries and keys and the write of keys and values, as one Pallas kernel.

What XLA makes of the same is several kernels a layer, each with little to do. It does not know
where the product came from or who attends.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from model.kernels.tiles import beyond_offsets, load, places, power_of_two
from model.linear import Norm
from model.pages import Pages, stored

MOST_NUMBERS = 8192
"""Of a tile: beyond, its halves and their angles don't fit a multiprocessor's registers."""


def uncovered(qkv_NKJC: jax.Array, pages: Pages) -> str:
    """Why the kernel can't take these shapes; empty when it can."""
    _, _, J, C = qkv_NKJC.shape
    if power_of_two(J) * power_of_two(C) > MOST_NUMBERS:
        return f"{J - 2} query heads of {C} channels share a kv head"
    return beyond_offsets(pages.keys)


def rotate_and_write(
    qkv_NKJC: Float[Array, "N K J C"],
    norms: tuple[Norm, Norm] | None,
    positions_N: Int[Array, "N"],
    inv_freq_H: Float[Array, " H"],
    rope_factor: Float[Array, ""],
    pages: Pages,
    page_N: Int[Array, "N"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N K G C"], Pages]:
    """As `model/kernels/xla_rotate.py`'s; the pages are written in place."""
    N, K, J, C = qkv_NKJC.shape
    tokens = max(1, min(power_of_two(N), 2048 // (power_of_two(J) * power_of_two(C))))
    operands = [qkv_NKJC, positions_N, inv_freq_H, rope_factor[None], page_N]
    operands += [norm.weight for norm in norms or ()]
    leaves, tree = jax.tree.flatten(pages)
    q_NKGC, *written = pl.pallas_call(
        partial(
            _kernel,
            tokens=tokens,
            norms=[(norm.eps, norm.offset) for norm in norms or ()],
        ),
        out_shape=(
            jax.ShapeDtypeStruct((N, K, J - 2, C), qkv_NKJC.dtype),
            *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves),
        ),
        grid=(pl.cdiv(N, tokens), K),
        input_output_aliases={len(operands) + i: 1 + i for i in range(len(leaves))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotate_and_write",
    )(*operands, *leaves)
    return q_NKGC, jax.tree.unflatten(tree, written)


def _kernel(
    qkv_ref,
    positions_ref,
    inv_freq_ref,
    factor_ref,
    page_ref,
    *refs,
    tokens: int,
    norms: list[tuple[float, float]],
):
    norm_refs, refs = refs[: len(norms)], refs[len(norms) :]
    # The pages come in as the first half and go out as the second: the same memory.
    q_ref, keys_ref, values_ref, *scale_refs = refs[len(refs) // 2 :]
    N, _, J, C = qkv_ref.shape
    H, dtype, kv_head = C // 2, qkv_ref.dtype, pl.program_id(1)

    slot_X = lax.iota(jnp.int32, tokens * power_of_two(J))
    token_X = pl.program_id(0) * tokens + slot_X // power_of_two(J)
    head_X = slot_X % power_of_two(J)
    here_X = (token_X < N) & (head_X < J)
    is_key_X, is_value_X = head_X == J - 2, head_X == J - 1

    first_XH, second_XH = (
        load(qkv_ref, *places((token_X, kv_head, head_X), H, here_X, start)).astype(jnp.float32)
        for start in (0, H)
    )
    turned_XH = (first_XH, second_XH)
    if norms:
        (q_eps, q_offset), (k_eps, k_offset) = norms
        squares_X = (first_XH * first_XH).sum(axis=1) + (second_XH * second_XH).sum(axis=1)
        scale_X = lax.rsqrt(squares_X / C + jnp.where(is_key_X, k_eps, q_eps))
        offset_X1 = jnp.where(is_key_X, k_offset, q_offset)[:, None]
        weights_XH = [
            jnp.where(is_key_X[:, None], key, query).astype(jnp.float32) + offset_X1
            for query, key in (
                [load(ref, *places((), H, None, start)) for ref in norm_refs] for start in (0, H)
            )
        ]
        # Rounded as a norm of its own would be.
        turned_XH = tuple(
            (half * scale_X[:, None] * weight).astype(dtype).astype(jnp.float32)
            for half, weight in zip(turned_XH, weights_XH, strict=True)
        )
    position_X = plgpu.load(positions_ref.at[token_X], mask=here_X, other=0)
    angle_XH = position_X.astype(jnp.float32)[:, None] * load(inv_freq_ref, *places((), H))
    cos_XH, sin_XH = jnp.cos(angle_XH) * factor_ref[0], jnp.sin(angle_XH) * factor_ref[0]
    turned_XH = (
        turned_XH[0] * cos_XH - turned_XH[1] * sin_XH,
        turned_XH[1] * cos_XH + turned_XH[0] * sin_XH,
    )
    out_XH = [
        jnp.where(is_value_X[:, None], value, turned).astype(dtype)
        for value, turned in zip((first_XH, second_XH), turned_XH, strict=True)
    ]

    def store(ref, index: tuple[jax.Array, ...], halves: list[jax.Array], mask_X: jax.Array):
        for start, half in zip((0, H), halves, strict=True):
            place, mask = places(index, H, mask_X, start)
            plgpu.store(ref.at[place], half.astype(ref.dtype), mask=mask)

    store(q_ref, (token_X, kv_head, head_X), out_XH, (token_X < N) & (head_X < J - 2))
    page_X = plgpu.load(page_ref.at[token_X], mask=here_X, other=0)
    halves_XH, scales_X = stored(out_XH, keys_ref.dtype)
    for i, (ref, is_mine_X) in enumerate(((keys_ref, is_key_X), (values_ref, is_value_X))):
        mask_X = here_X & is_mine_X
        # The interpreter writes masked rows too, as they were: they must not share a place.
        where = (jnp.where(mask_X, page_X, 0), position_X % keys_ref.shape[1], kv_head)
        store(ref, where, halves_XH, mask_X)
        if scales_X is not None:
            plgpu.store(scale_refs[i].at[where], scales_X, mask=mask_X)
