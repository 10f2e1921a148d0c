"""Attention over pages as one Pallas kernel (Triton back end): decode rows and prefill rows alike.

A program takes a tile of one row's queries, all query heads of one kv head, over a share of the
row's keys. Decode rows have few tiles, so their keys are split among programs and the parts merged
by their log-sum-exp (Flash-Decoding, https://pytorch.org/blog/flash-decoding/); tiles of a prefill
row take all keys they see (FlashAttention-2, arXiv:2307.08691). It does not know requests.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from model.kernels.tiles import dot, load, places, power_of_two
from model.pages import Pages

LEAST_TILE = 16
"""Rows of the smallest tensor-core product; a tile with fewer queries is padded to as many."""

NOTHING_SEEN = -1e30
"""The peak of a query before its first key: finite, so that two of them differ by 0, not NaN."""

LOG2_E = math.log2(math.e)
NUM_CORES = 132
"""Multiprocessors of an H100 or H200 (SXM)."""

MAX_WIDTH = 256
"""Channels of a head beyond which a tile's sums don't fit a multiprocessor's registers."""


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
    # Pallas (0.11.2) counts in 32 bits up to 2**32 bytes; a byte a number then overflows them.
    for cached in (pages.keys, pages.values):
        if cached.size >= 2**31 and cached.size * cached.dtype.itemsize <= 2**32:
            return f"{cached.size:,} numbers a layer in {cached.dtype.name} pages"
    return ""


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
    kernel = partial(
        _kernel,
        tiling=tiling,
        heads=heads,
        tiles=tiles,
        scale=scale,
        softcap=softcap,
        has_sinks=sinks_KG is not None,
        has_scales=pages.key_scales is not None,
    )
    operands = [q_RTKGC, *jax.tree.leaves(pages), tables_RW, starts_R, lengths_R, window[None]]
    operands += [] if sinks_KG is None else [sinks_KG]
    call = pl.pallas_call(
        kernel,
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
    )
    out_ZRTKGU, lse_ZRTKG = call(*operands)
    if splits == 1:
        return out_ZRTKGU[0]
    return _merge(out_ZRTKGU, lse_ZRTKG, q_RTKGC.dtype, interpret)


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    *refs,
    tiling: Tiling,
    heads: int,
    tiles: int,
    scale: float,
    softcap: float | None,
    has_sinks: bool,
    has_scales: bool,
):
    refs = iter(refs)
    scale_refs = (next(refs), next(refs)) if has_scales else None
    tables_ref, starts_ref, lengths_ref, window_ref = (next(refs) for _ in range(4))
    sinks_ref = next(refs) if has_sinks else None
    out_ref, lse_ref = refs
    _, T, _, G, C = q_ref.shape
    page_size, U, W = v_ref.shape[1], v_ref.shape[-1], tables_ref.shape[1]
    tile_tokens = max(1, tiling.queries // heads)
    X, S = tile_tokens * heads, tiling.keys

    # The last tiles of the last rows see most keys: they start first.
    tile = pl.num_programs(0) - 1 - pl.program_id(0)
    row, kv_head, split = tile // tiles, pl.program_id(1), pl.program_id(2)
    first_token = (tile % tiles) * tile_tokens
    start, length, window = starts_ref[row], lengths_ref[row], window_ref[0]

    slot_X = lax.iota(jnp.int32, X)
    token_X, head_X = first_token + slot_X // heads, slot_X % heads
    at_X = start + token_X
    is_query_X = (token_X < T) & (head_X < G)
    q_XC = load(q_ref, *places((row, token_X, kv_head, head_X), C, is_query_X))
    # A float of 8 bits is turned into float16 by one instruction, into bfloat16 by three.
    is_float8 = k_ref.dtype.itemsize == 1 and jnp.issubdtype(k_ref.dtype, jnp.floating)
    dtype = jnp.float16 if is_float8 and q_XC.dtype == jnp.bfloat16 else q_XC.dtype
    q_XC = q_XC.astype(dtype)

    # Blocks of keys that some query of the tile sees, and this program's share of them.
    last_token = jnp.minimum(first_token + tile_tokens, length) - 1
    end = jnp.where(last_token < first_token, 0, pl.cdiv(start + last_token + 1, S))
    begin = jnp.maximum(start + first_token - window + 1, 0) // S
    share = pl.cdiv(jnp.maximum(end - begin, 0), tiling.splits)
    begin = begin + split * share
    end = jnp.minimum(end, begin + share)

    def visit(masked: bool, i, carry):
        peak_X, total_X, sum_XU = carry
        key_S = i * S + lax.iota(jnp.int32, S)
        page_S = plgpu.load(
            tables_ref.at[row, key_S // page_size], mask=key_S < W * page_size, other=0
        )
        token = (page_S, key_S % page_size, kv_head)
        k_SC = load(k_ref, *places(token, C)).astype(dtype)
        scores_XS = dot(q_XC, k_SC.T) * scale
        if scale_refs:
            scores_XS = scores_XS * plgpu.load(scale_refs[0].at[token])[None, :]
        if softcap is not None:
            scores_XS = softcap * jnp.tanh(scores_XS / softcap)
        scores_XS = scores_XS * LOG2_E
        if masked:
            seen_XS = (key_S[None, :] <= at_X[:, None]) & (key_S[None, :] > at_X[:, None] - window)
            scores_XS = jnp.where(seen_XS, scores_XS, -jnp.inf)
        new_peak_X = jnp.maximum(peak_X, scores_XS.max(axis=1))
        weights_XS = jnp.exp2(scores_XS - new_peak_X[:, None])
        decay_X = jnp.exp2(peak_X - new_peak_X)
        total_X = total_X * decay_X + weights_XS.sum(axis=1)
        if scale_refs:
            weights_XS = weights_XS * plgpu.load(scale_refs[1].at[token])[None, :]
        v_SU = load(v_ref, *places(token, U)).astype(dtype)
        seen_XU = dot(weights_XS.astype(dtype), v_SU)
        return new_peak_X, total_X, sum_XU * decay_X[:, None] + seen_XU

    peak_X, total_X = jnp.full((X,), NOTHING_SEEN), jnp.zeros((X,), jnp.float32)
    if sinks_ref is not None:
        # A sink is a key without a value, seen by one of the programs that share the keys.
        sinks_X = plgpu.load(sinks_ref.at[kv_head, head_X], mask=head_X < G, other=0)
        has_sink = split == 0
        peak_X = jnp.where(has_sink, sinks_X.astype(jnp.float32) * LOG2_E, peak_X)
        total_X = jnp.where(has_sink, 1.0, total_X)
    carry = (peak_X, total_X, jnp.zeros((X, power_of_two(U)), jnp.float32))
    # Between the window's edge and the diagonal every query sees every key: no mask.
    clear_end = jnp.clip((start + first_token + 1) // S, begin, end)
    clear_begin = jnp.clip(pl.cdiv(start + last_token + 1 - window, S), begin, clear_end)
    if T == 1:
        carry = lax.fori_loop(begin, end, partial(visit, True), carry)
    else:
        carry = lax.fori_loop(begin, clear_begin, partial(visit, True), carry)
        carry = lax.fori_loop(clear_begin, clear_end, partial(visit, False), carry)
        carry = lax.fori_loop(clear_end, end, partial(visit, True), carry)
    peak_X, total_X, sum_XU = carry

    out_XU = sum_XU / jnp.maximum(total_X, 1e-30)[:, None]
    out_place, out_mask = places((split, row, token_X, kv_head, head_X), U, is_query_X)
    plgpu.store(out_ref.at[out_place], out_XU.astype(out_ref.dtype), mask=out_mask)
    lse_X = peak_X + jnp.log2(jnp.maximum(total_X, 1e-30))
    plgpu.store(lse_ref.at[split, row, token_X, kv_head, head_X], lse_X, mask=is_query_X)


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
