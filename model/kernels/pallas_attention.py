"""Attention over pages as one Pallas kernel (Triton back end): decode rows and prefill rows alike.

A program takes a tile of one row's queries, all query heads of one kv head, over a share of the
row's keys. Decode rows have few tiles, so their keys are split among programs and the parts merged
by their log-sum-exp (Flash-Decoding, https://pytorch.org/blog/flash-decoding/); tiles of a prefill
row take all keys they see (FlashAttention-2, arXiv:2307.08691). It does not know requests.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from model.kernels.tiles import (
    LEAST_TILE,
    NUM_CORES,
    beyond_offsets,
    dot,
    load,
    places,
    power_of_two,
)
from model.kernels.xla_attention import LEAST_TOTAL, NOTHING_SEEN
from model.pages import Pages

LOG2_E = math.log2(math.e)
MAX_WIDTH = 256
"""Channels of a head beyond which a tile's sums don't fit a multiprocessor's registers."""

Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Of a tile's queries over keys seen: peaks of scores, sums of weights, sums of values."""


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; changes speed, and the order of sums, only."""

    queries: int
    """Tokens x heads of a tile."""
    keys: int
    """Keys per turn of the loop."""
    splits: int
    """Programs that share a tile's keys."""
    num_warps: int
    num_stages: int
    """Turns whose loads are under way at once."""


def uncovered(q_RTKGC: jax.Array, pages: Pages) -> str:
    """Why the kernel can't take these shapes; empty when it can."""
    _, _, _, group, width = q_RTKGC.shape
    narrowest, widest = sorted((width, pages.values.shape[-1]))
    if power_of_two(narrowest) < LEAST_TILE:
        return f"heads of {narrowest} channels, more than {LEAST_TILE // 2} needed"
    if widest > MAX_WIDTH:
        return f"heads of {widest} channels, of {MAX_WIDTH} possible"
    if group > 128:
        return f"{group} query heads share a kv head, of 128 possible"
    return beyond_offsets(pages.keys) or beyond_offsets(pages.values)


def default_tiling(q_RTKGC: jax.Array) -> Tiling:
    """A tiling for these queries on a Hopper GPU."""
    rows, length, kv_heads, group, width = q_RTKGC.shape
    # 64 keys of 256 channels in float32 don't fit the shared memory beside 128 such queries.
    keys = 32 if q_RTKGC.dtype == jnp.float32 else 64
    if length > 1:
        heads = power_of_two(group)
        queries = max(LEAST_TILE, heads, min(128, power_of_two(length) * heads))
        num_warps = 8 if queries * width >= 128 * 128 else 4
        return Tiling(queries, keys, 1, num_warps, num_stages=3)
    programs = rows * kv_heads
    splits = power_of_two(max(1, min(64, 4 * NUM_CORES // programs)))
    return Tiling(max(LEAST_TILE, power_of_two(group)), keys, splits, num_warps=4, num_stages=3)


def paged_attention(
    q_RTKGC: Float[Array, "R T K G C"],
    pages: Pages,
    tables_RW: Int[Array, "R W"],
    starts_R: Int[Array, "R"],
    lengths_R: Int[Array, "R"],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
    sinks_KG: Float[Array, "K G"] | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "R T K G U"]:
    """As `model/kernels/xla_attention.py`'s, on shapes for which `uncovered` is empty."""
    R, T, K, G, _ = q_RTKGC.shape
    U = pages.values.shape[-1]
    tiling = tiling or default_tiling(q_RTKGC)
    heads = max(power_of_two(G), LEAST_TILE if T == 1 else 1)
    tile_tokens = max(1, tiling.queries // heads)
    tiles, splits = -(-T // tile_tokens), tiling.splits
    parts = (splits, R, T, K, G)
    out_ZRTKGU, lse_ZRTKG = pl.pallas_call(
        partial(_kernel, tiling=tiling, heads=heads, tiles=tiles, scale=scale, softcap=softcap),
        out_shape=(
            jax.ShapeDtypeStruct((*parts, U), q_RTKGC.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ),
        grid=(R * tiles, K, splits),
        compiler_params=plgpu.CompilerParams(
            num_warps=tiling.num_warps, num_stages=tiling.num_stages
        ),
        interpret=interpret,
        name="paged_attention",
    )(q_RTKGC, pages, tables_RW, starts_R, lengths_R, window[None], sinks_KG)
    if splits == 1:
        return out_ZRTKGU[0]
    return _merge(out_ZRTKGU, lse_ZRTKG, q_RTKGC.dtype, interpret)


def _kernel(
    q_ref: Any,
    pages: Pages,
    tables_ref: Any,
    starts_ref: Any,
    lengths_ref: Any,
    window_ref: Any,
    sinks_ref: Any | None,
    out_ref: Any,
    lse_ref: Any,
    *,
    tiling: Tiling,
    heads: int,
    tiles: int,
    scale: float,
    softcap: float | None,
) -> None:
    """One tile's queries over one share of its keys; `pages` holds references."""
    _, T, _, G, C = q_ref.shape
    U, S, tile_tokens = pages.values.shape[-1], tiling.keys, max(1, tiling.queries // heads)

    # The last tiles of the last rows see most keys: they start first.
    tile = pl.num_programs(0) - 1 - pl.program_id(0)
    row, kv_head, split = tile // tiles, pl.program_id(1), pl.program_id(2)
    first_token = (tile % tiles) * tile_tokens
    start, length, window = starts_ref[row], lengths_ref[row], window_ref[0]

    slot_X = lax.iota(jnp.int32, tile_tokens * heads)
    token_X, head_X = first_token + slot_X // heads, slot_X % heads
    at_X = start + token_X
    is_query_X = (token_X < T) & (head_X < G)
    q_XC = load(q_ref, *places((row, token_X, kv_head, head_X), C, is_query_X))
    q_XC = q_XC.astype(_product_dtype(q_ref.dtype, pages.keys.dtype))

    def visit(masked: bool, i: jax.Array, carry: Carry) -> Carry:
        key_S = i * S + lax.iota(jnp.int32, S)
        token = (*_place(tables_ref, row, key_S, pages.page_size), kv_head)
        k_SC = load(pages.keys, *places(token, C)).astype(q_XC.dtype)
        key_scale_S = None
        if pages.key_scales is not None:
            key_scale_S = load(pages.key_scales, token, None)
        scores_XS = _scores(dot(q_XC, k_SC.T) * scale, key_scale_S, softcap)
        if masked:
            seen_XS = (key_S[None, :] <= at_X[:, None]) & (key_S[None, :] > at_X[:, None] - window)
            scores_XS = jnp.where(seen_XS, scores_XS, -jnp.inf)
        weights_XS, decay_X, peak_X, total_X = _soften(scores_XS, *carry[:2])
        if pages.value_scales is not None:
            weights_XS = weights_XS * load(pages.value_scales, token, None)[None, :]
        v_SU = load(pages.values, *places(token, U)).astype(q_XC.dtype)
        seen_XU = dot(weights_XS.astype(q_XC.dtype), v_SU)
        return peak_X, total_X, carry[2] * decay_X[:, None] + seen_XU

    last_token = jnp.minimum(first_token + tile_tokens, length) - 1
    begin, clear_begin, clear_end, end = _blocks(
        start + first_token, start + last_token, window, S, split, tiling.splits
    )
    sinks_X = None
    if sinks_ref is not None:
        sinks_X = plgpu.load(sinks_ref.at[kv_head, head_X], mask=head_X < G, other=0)
    carry = (*_before_keys(len(slot_X), sinks_X, split), jnp.zeros((len(slot_X), power_of_two(U))))
    if T == 1:
        carry = lax.fori_loop(begin, end, partial(visit, True), carry)
    else:
        carry = lax.fori_loop(begin, clear_begin, partial(visit, True), carry)
        carry = lax.fori_loop(clear_begin, clear_end, partial(visit, False), carry)
        carry = lax.fori_loop(clear_end, end, partial(visit, True), carry)
    peak_X, total_X, sum_XU = carry

    total_X = jnp.maximum(total_X, LEAST_TOTAL)
    place, mask = places((split, row, token_X, kv_head, head_X), U, is_query_X)
    plgpu.store(out_ref.at[place], (sum_XU / total_X[:, None]).astype(out_ref.dtype), mask=mask)
    lse_place = (split, row, token_X, kv_head, head_X)
    plgpu.store(lse_ref.at[lse_place], peak_X + jnp.log2(total_X), mask=is_query_X)


def _product_dtype(queries: jnp.dtype, cached: jnp.dtype) -> jnp.dtype:
    """What queries, keys and values are multiplied in.

    A float of 8 bits is turned into float16 by one instruction, into bfloat16 by three.
    """
    is_float8 = cached.itemsize == 1 and jnp.issubdtype(cached, jnp.floating)
    return jnp.dtype(jnp.float16) if is_float8 and queries == jnp.bfloat16 else queries


def _place(
    tables_ref: Any, row: jax.Array, key_S: jax.Array, page_size: int
) -> tuple[jax.Array, jax.Array]:
    """Each key's page, the null page beyond the row's table, and its place there."""
    is_listed_S = key_S < tables_ref.shape[1] * page_size
    page_S = plgpu.load(tables_ref.at[row, key_S // page_size], mask=is_listed_S, other=0)
    return page_S, key_S % page_size


def _blocks(
    first: jax.Array, last: jax.Array, window: jax.Array, size: int, split: jax.Array, splits: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """This program's share of the blocks of keys that queries at `first .. last` see.

    They go from the first of the four to the last. Those between the others, from the window's edge
    to the diagonal, are seen whole by every query. No query, no block: where `last < first`.
    """
    begin = jnp.maximum(first - window + 1, 0) // size
    end = jnp.where(last < first, 0, pl.cdiv(last + 1, size))
    share = pl.cdiv(jnp.maximum(end - begin, 0), splits)
    begin = begin + split * share
    end = jnp.minimum(end, begin + share)
    clear_end = jnp.clip((first + 1) // size, begin, end)
    clear_begin = jnp.clip(pl.cdiv(last + 1 - window, size), begin, clear_end)
    return begin, clear_begin, clear_end, end


def _before_keys(
    size: int, sinks_X: jax.Array | None, split: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Peaks and totals before the first key.

    A sink is a key without a value, seen by one of the programs that share the keys.
    """
    peak_X, total_X = jnp.full((size,), NOTHING_SEEN), jnp.zeros((size,))
    if sinks_X is None:
        return peak_X, total_X
    has_sink = split == 0
    peak_X = jnp.where(has_sink, sinks_X.astype(jnp.float32) * LOG2_E, peak_X)
    return peak_X, jnp.where(has_sink, 1.0, total_X)


def _scores(
    products_XS: jax.Array, key_scale_S: jax.Array | None, softcap: float | None
) -> jax.Array:
    """Scores to the base of 2."""
    if key_scale_S is not None:
        products_XS = products_XS * key_scale_S[None, :]
    if softcap is not None:
        products_XS = softcap * jnp.tanh(products_XS / softcap)
    return products_XS * LOG2_E


def _soften(
    scores_XS: jax.Array, peak_X: jax.Array, total_X: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights of these keys, the decay of what was summed before, and the new peaks and totals."""
    new_peak_X = jnp.maximum(peak_X, scores_XS.max(axis=1))
    weights_XS = jnp.exp2(scores_XS - new_peak_X[:, None])
    decay_X = jnp.exp2(peak_X - new_peak_X)
    return weights_XS, decay_X, new_peak_X, total_X * decay_X + weights_XS.sum(axis=1)


def _merge(
    out_ZRTKGU: jax.Array, lse_ZRTKG: jax.Array, dtype: jnp.dtype, interpret: bool
) -> jax.Array:
    """The parts' mean, weighted by what each saw; `lse` is to the base of 2."""
    splits, *shape, U = out_ZRTKGU.shape
    rows = math.prod(shape)

    def kernel(out_ref, lse_ref, merged_ref):
        row, split_Z = pl.program_id(0), lax.iota(jnp.int32, splits)
        lse_Z = plgpu.load(lse_ref.at[split_Z, row])
        weight_Z = jnp.exp2(lse_Z - lse_Z.max())
        out_ZU = load(out_ref, *places((split_Z, row), U))
        merged_1U = (out_ZU * weight_Z[:, None]).sum(axis=0)[None] / weight_Z.sum()
        place, mask = places((row,), U)
        plgpu.store(merged_ref.at[place], merged_1U.astype(dtype), mask=mask)

    merged = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, U), dtype),
        grid=(rows,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_attention",
    )(out_ZRTKGU.reshape(splits, rows, U), lse_ZRTKG.reshape(splits, rows))
    return merged.reshape(*shape, U)
