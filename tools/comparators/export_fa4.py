"""Compiles FlashAttention 4 for Hopper into fa4.o and fa4.h, in an environment that has it.

    python export_fa4.py FOLDER HEAD_DIM GROUP_SIZE PAGE_SIZE

Causal, bfloat16, prompts of any lengths over pages. It does not know who calls it (fa4.cu).
"""

# What it imports is in that environment, which the type checker does not see.
# pyright: reportMissingImports=false

import sys
from collections.abc import Sequence
from typing import Any

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import cute
from cutlass.cute.runtime import (
    make_fake_compact_tensor,
    make_fake_stream,
    make_fake_tensor,
)
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

# Of queries, and of keys, as flash_attn.cute.interface has it for causal heads of 128 channels.
# Pages of as many tokens are fetched whole, by TMA; of others, row by row.
TILE = 128


def main(folder: str, head_dim: int, group_size: int, page_size: int) -> None:
    kernel = FlashAttentionForwardSm90(
        cutlass.BFloat16,
        head_dim,
        head_dim,
        group_size,
        is_causal=True,
        is_local=False,
        pack_gqa=False,
        tile_m=TILE,
        tile_n=TILE,
        num_stages=2,
        num_threads=3 * 128,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=True,
        paged_kv_non_tma=page_size != TILE,
    )

    @cute.jit
    def attend(
        queries: cute.Tensor,
        keys: cute.Tensor,
        values: cute.Tensor,
        tables: cute.Tensor,
        begins: cute.Tensor,
        num_queries: cute.Tensor,
        num_keys: cute.Tensor,
        out: cute.Tensor,
        scale: cutlass.Float32,
        stream: CUstream,
    ) -> None:
        kernel(
            queries,
            keys,
            values,
            out,
            None,
            scale,
            mCuSeqlensQ=begins,
            mSeqUsedQ=num_queries,
            mSeqUsedK=num_keys,
            mPageTable=tables,
            stream=stream,
        )

    heads = (cute.sym_int(), cute.sym_int(), cute.sym_int())
    pages = (cute.sym_int(), page_size, cute.sym_int(), head_dim)
    compiled = cute.compile(
        attend,
        rows(cutlass.BFloat16, heads, 16),
        rows(cutlass.BFloat16, pages, 16),
        rows(cutlass.BFloat16, pages, 16),
        rows(cutlass.Int32, (cute.sym_int(), cute.sym_int()), 4),
        *(make_fake_compact_tensor(cutlass.Int32, (cute.sym_int(),)) for _ in range(3)),
        rows(cutlass.BFloat16, heads, 16),
        cutlass.Float32(1),
        make_fake_stream(),
    )
    compiled.export_to_c(folder, "fa4")


def rows(dtype: Any, shape: Sequence[Any], alignment: int) -> Any:
    """An array whose last axis alone is known to be contiguous."""
    numbers = max(1, alignment * 8 // dtype.width)
    strides = (*(cute.sym_int64(divisibility=numbers) for _ in shape[1:]), 1)
    return make_fake_tensor(dtype, tuple(shape), stride=strides, assumed_align=alignment)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
