"""Attention over pages, of decode rows or of prompts, as it is tried.

It does not know what is compared or timed.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.attention import NO_WINDOW
from model.kernels import pallas_attention, xla_attention
from plan.kinds.kernel import Kernel
from plan.trial import AT_ONCE, LEAST_CALLS, LONG_CALLS, MOST_CALLS, Trial


class Attention(Trial):
    """Over one pool of pages and a page table for each of the chain's calls."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.decodes = kernel.operation == "decode_attention"
        self.length = 1 if self.decodes else kernel.chunk
        pieces = 1 if self.decodes else -(-kernel.prompt // kernel.chunk)
        self.sequence_R, piece_R = np.divmod(np.arange(kernel.rows * pieces), pieces)
        # They differ by some tokens, so that they end at different places of a page.
        shorter_R = 7 * self.sequence_R % max(1, min(kernel.page_size, kernel.context))
        self.starts_R = kernel.context - shorter_R + piece_R * self.length
        left_R = max(1, kernel.prompt) - piece_R * self.length
        self.lengths_R = np.minimum(self.length, left_R)

        pairs, seen = self._count()
        heads, head_dim = self.model.num_heads, self.model.head_dim
        new_numbers = 2 * int(self.lengths_R.sum()) * heads * head_dim
        self.flops = 4 * heads * head_dim * pairs
        self.moved_bytes = seen * self.token_bytes + new_numbers * self.dtype.itemsize
        self.num_tables, self.at_once, self.num_calls = 1, LONG_CALLS, LONG_CALLS
        if self.decodes:
            self.num_tables = min(MOST_CALLS, -(-kernel.cold_bytes // self.moved_bytes))
            self.at_once = min(AT_ONCE, self.num_tables)
            self.num_calls = self.at_once * -(-max(LEAST_CALLS, self.num_tables) // self.at_once)

    def _count(self) -> tuple[int, int]:
        """Pairs of query and key, and tokens whose keys and values are seen."""
        window = self.kernel.window or NO_WINDOW
        pairs, firsts, ends = 0, {}, {}
        rows = zip(self.sequence_R, self.starts_R, self.starts_R + self.lengths_R, strict=True)
        for sequence, start, end in ((int(part) for part in row) for row in rows):
            pairs += sum(min(at + 1, window) for at in range(start, end))
            firsts.setdefault(sequence, max(0, start + 1 - window))
            ends[sequence] = end
        return pairs, sum(ends.values()) - sum(firsts.values())

    def make(self) -> Any:
        K, G, C = self.model.num_kv_heads, self.model.group_size, self.model.head_dim
        page_size, rows = self.kernel.page_size, self.kernel.rows
        ends = self.starts_R + self.lengths_R
        width = -(-int(ends.max()) // page_size)
        mixed = np.random.default_rng(0).permutation(self.num_tables * rows * width) + 1
        tables = mixed.reshape(self.num_tables, rows, width)[:, self.sequence_R]
        tables = tables[np.arange(self.num_calls) % self.num_tables]
        sinks_KG = self.random(5, (K, G)) if self.kernel.sinks else None
        return (
            self.random(0, (len(self.sequence_R), self.length, K, G, C)),
            self.pages(mixed.size + 1),
            jnp.asarray(tables, jnp.int32),
            jnp.asarray(self.starts_R, jnp.int32),
            jnp.asarray(self.lengths_R, jnp.int32),
            jnp.int32(self.kernel.window or NO_WINDOW),
            sinks_KG,
        )

    def one(self, q, pages, tables_LRW, starts_R, lengths_R, window, sinks_KG):
        out = self._attend(q, pages, tables_LRW[0], starts_R, lengths_R, window, sinks_KG)
        counts_RT = jnp.arange(self.length) < lengths_R[:, None]
        return jnp.where(counts_RT[..., None, None, None], out.astype(jnp.float32), 0)

    def chain(self, q, pages, tables_LRW, *rest):
        def turn(q, tables_XRW):
            for i in range(self.at_once):
                q = self._attend(q, pages, tables_XRW[i], *rest)
            return q, None

        return lax.scan(turn, q, tables_LRW.reshape(-1, self.at_once, *tables_LRW.shape[1:]))[0]

    def _attend(self, q, pages, tables_RW, starts_R, lengths_R, window, sinks_KG):
        if self.kernel.kernel == "cudnn":
            return self._whole(q, pages, tables_RW)
        attend: Callable[..., jax.Array] = xla_attention.paged_attention
        if self.by_pallas:
            attend = partial(
                pallas_attention.paged_attention,
                tiling=self._tiling(q) if self.kernel.tiling else None,
                interpret=self.interpret,
            )
        return attend(
            q,
            pages,
            tables_RW,
            starts_R,
            lengths_R,
            scale=self.model.head_dim**-0.5,
            window=window,
            softcap=self.kernel.softcap or None,
            sinks_KG=sinks_KG,
        )

    def _tiling(self, q: jax.Array) -> pallas_attention.Tiling:
        asked = (part.split("=") for part in self.kernel.tiling.split(","))
        asked = {name: int(value) for name, value in asked}
        return replace(pallas_attention.default_tiling(q), **asked)

    def _whole(self, q_RTKGC, pages, tables_RW):
        """Prompts as a whole, causal, keys and values first brought together."""
        B = self.kernel.rows
        tables_BW = tables_RW.reshape(B, -1, tables_RW.shape[-1])[:, 0]
        q_BTHC = q_RTKGC.reshape(B, -1, self.model.num_heads, self.model.head_dim)
        k_BTKC, v_BTKC = (
            cached[tables_BW].reshape(B, -1, *cached.shape[-2:])[:, : q_BTHC.shape[1]]
            for cached in (pages.keys, pages.values)
        )
        short = q_BTHC.shape[1] - k_BTKC.shape[1]
        pad = ((0, 0), (0, short), (0, 0), (0, 0))
        # Elsewhere there is no cuDNN, and a dry run is to come this far.
        implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
        out_BTHC = jax.nn.dot_product_attention(
            q_BTHC,
            jnp.pad(k_BTKC, pad),
            jnp.pad(v_BTKC, pad),
            scale=self.model.head_dim**-0.5,
            is_causal=True,
            implementation=implementation,
        )
        return out_BTHC.reshape(q_RTKGC.shape)

    def refusal(self, q, pages, *_) -> str:
        return pallas_attention.uncovered(q, pages)
