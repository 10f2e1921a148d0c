"""The operations of `model/kernels` as they are tried: on random numbers, once and in a chain.

A chain is a program of many calls, each of which meets other memory than the ones before: so that a
call's time is that of the kernel, not of its launch, and of memory, not of a cache. It does not
know what is compared or timed (`plan/kernels.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.attention import NO_WINDOW
from model.config import ModelConfig
from model.kernels import (
    pallas_attention,
    pallas_matmul,
    pallas_rotate,
    xla_attention,
    xla_matmul,
    xla_rotate,
)
from model.linear import Norm
from model.mlp import activation
from model.pages import Pages
from plan.kinds.kernel import Kernel
from plan.models import load_model

MOST_CALLS = 64
AT_ONCE = 8
"""Calls side by side in a turn of a chain's loop, where XLA can put them into a graph."""
LEAST_CALLS = 8
LONG_CALLS = 4
"""Calls of a chain whose calls are long."""


class Trial(ABC):
    """One operation at one shape, by one kernel."""

    moved_bytes: int
    """What a call must read and write at least."""
    flops: int
    num_calls: int
    """Of a chain."""
    tolerance: float
    """How far a right answer may be from the reference, of the reference's largest number."""

    def __init__(self, kernel: Kernel) -> None:
        model = load_model(kernel.model)
        self.kernel = kernel
        self.model = replace(model, head_dim=kernel.head_dim) if kernel.head_dim else model
        self.dtype = jnp.dtype(kernel.dtype)
        self.tolerance = 1e-4 if self.dtype == jnp.float32 else 0.02

    @abstractmethod
    def make(self) -> Any:
        """The arguments, made on the device (under jit)."""

    @abstractmethod
    def one(self, *arguments: Any) -> Any:
        """A call's results, as far as they count, in float32."""

    @abstractmethod
    def chain(self, *arguments: Any) -> Any:
        """`num_calls` calls one after the other."""

    def uncovered(self) -> str:
        """Why the kernel can't take this shape; empty when it can."""
        return ""

    @property
    def interpret(self) -> bool:
        return self.kernel.kernel == "pallas_interpreted"

    @property
    def by_pallas(self) -> bool:
        return self.kernel.kernel.startswith("pallas")

    def random(self, seed: int, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
        return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype or self.dtype)

    def pages(self, num_pages: int) -> Pages:
        """Pages full of random numbers."""
        model, kernel = self.model, self.kernel
        shape = (num_pages, kernel.page_size, model.num_kv_heads, model.head_dim)
        if kernel.cache_dtype == "int8":
            keys, values = (
                jax.random.randint(jax.random.key(i, impl="rbg"), shape, -127, 128, jnp.int8)
                for i in (1, 2)
            )
            scales = (jnp.abs(self.random(i, shape[:-1], jnp.float32)) / 60 for i in (3, 4))
            return Pages(keys, values, *scales)
        wide = jnp.float32 if kernel.cache_dtype == "float32" else jnp.bfloat16
        keys, values = (self.random(i, shape, wide).astype(kernel.cache_dtype) for i in (1, 2))
        return Pages(keys, values)

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in one layer's pages."""
        dtype = jnp.dtype(self.kernel.cache_dtype)
        scales = 2 * 4 if dtype == jnp.int8 else 0
        return self.model.num_kv_heads * (2 * self.model.head_dim * dtype.itemsize + scales)


def trial(kernel: Kernel) -> Trial:
    return TRIALS[kernel.operation](kernel)


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
        self.num_tables, self.at_once, self.num_calls = 1, 1, LONG_CALLS
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

    def uncovered(self) -> str:
        q, pages, *_ = jax.eval_shape(self.make)
        return pallas_attention.uncovered(q, pages) if self.by_pallas else ""


class Rotate(Trial):
    """One token of each row, written to a page of its own."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        heads = self.model.num_heads + self.model.num_kv_heads
        numbers = (2 * heads) * self.model.head_dim  # read, and queries written
        self.moved_bytes = kernel.rows * (numbers * self.dtype.itemsize + self.token_bytes)
        self.flops = 0
        # What is interpreted takes long to compile.
        self.at_once = 1 if self.interpret else AT_ONCE
        self.num_calls = LEAST_CALLS * self.at_once
        if kernel.cache_dtype == "float8_e4m3fn":
            # One place of its 3 bits, where two roundings in float32 fall on both sides of a tie.
            self.tolerance = 0.13

    def make(self) -> Any:
        model, N = self.model, self.kernel.rows
        K, J, C = model.num_kv_heads, model.group_size + 2, model.head_dim
        weights = [self.random(i, (C,)) for i in (6, 7)] if model.qk_norm == "head" else None
        return (
            self.random(0, (N, K, J, C)),
            weights,
            jnp.arange(N) * 7 + self.kernel.context,
            1e4 ** -jnp.linspace(0, 1, C // 2, endpoint=False, dtype=jnp.float32),
            self.pages(N + 1),
            jnp.arange(1, N + 1),
        )

    def one(self, qkv, weights, positions_N, inv_freq_H, pages, page_N):
        q, pages = self._rotate(qkv, weights, positions_N, inv_freq_H, pages, page_N)
        keys, values = (x.astype(jnp.float32) for x in (pages.keys, pages.values))
        if pages.key_scales is not None and pages.value_scales is not None:
            keys, values = (
                keys * pages.key_scales[..., None],
                values * pages.value_scales[..., None],
            )
        return q.astype(jnp.float32), keys[1:], values[1:]

    def chain(self, qkv, weights, positions_N, inv_freq_H, pages, page_N):
        def turn(carry, i):
            _, pages = carry
            queries = []
            for place in range(self.at_once):
                # At other positions each time, or XLA would do it once.
                positions = positions_N + (i * self.at_once + place)
                q, pages = self._rotate(qkv, weights, positions, inv_freq_H, pages, page_N)
                queries.append(q)
            return (queries, pages), None

        N, K, J, C = qkv.shape
        empty = [jnp.zeros((N, K, J - 2, C), qkv.dtype)] * self.at_once
        return lax.scan(turn, (empty, pages), jnp.arange(LEAST_CALLS))[0]

    def _rotate(self, qkv, weights, positions_N, inv_freq_H, pages, page_N):
        rotate: Callable[..., Any] = xla_rotate.rotate_and_write
        if self.by_pallas:
            rotate = partial(pallas_rotate.rotate_and_write, interpret=self.interpret)
        norms = None
        if weights is not None:
            q_norm, k_norm = (Norm(weight, self.model.norm_eps) for weight in weights)
            norms = (q_norm, k_norm)
        return rotate(qkv, norms, positions_N, inv_freq_H, jnp.float32(1), pages, page_N)

    def uncovered(self) -> str:
        qkv, _, _, _, pages, _ = jax.eval_shape(self.make)
        return pallas_rotate.uncovered(qkv, pages) if self.by_pallas else ""


class Product(Trial):
    """A layer's product, with a weight of its own for each call at once."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.depth, self.parts, self.width = _weight_shape(self.model, kernel.weight)
        self.has_norm = kernel.weight in ("qkv", "gate_up")
        weight_bytes = self.depth * self.parts * self.width * self.dtype.itemsize
        numbers = self.depth + self.width * (1 if self.has_norm else 2)
        self.moved_bytes = weight_bytes + kernel.rows * numbers * self.dtype.itemsize
        self.flops = 2 * kernel.rows * self.depth * self.parts * self.width
        self.num_weights = min(MOST_CALLS // 2, max(2, kernel.cold_bytes // weight_bytes))
        self.num_calls = LONG_CALLS * self.num_weights

    def make(self) -> Any:
        rows = self.kernel.rows
        shape = (self.depth, self.parts, self.width)
        return (
            self.random(0, (rows, self.depth)),
            [self.random(10 + i, shape) / self.depth**0.5 for i in range(self.num_weights)],
            self.random(1, (self.depth,)) if self.has_norm else None,
            None if self.has_norm else self.random(2, (rows, self.width)),
        )

    def one(self, x_ND, weights, norm_D, residual_NF):
        return self._multiply(x_ND, weights[0], norm_D, residual_NF).astype(jnp.float32)

    def chain(self, x_ND, weights, norm_D, residual_NF):
        def turn(_, i):
            # Other rows each time, or XLA would do it once.
            x = x_ND + i.astype(x_ND.dtype) * 1e-3
            return [self._multiply(x, weight, norm_D, residual_NF) for weight in weights], None

        empty = [jnp.zeros((self.kernel.rows, self.width), self.dtype)] * self.num_weights
        return lax.scan(turn, empty, jnp.arange(LONG_CALLS))[0]

    def _multiply(self, x_ND, weight, norm_D, residual_NF):
        multiply: Callable[..., jax.Array] = xla_matmul.fused_matmul
        if self.by_pallas:
            multiply = partial(pallas_matmul.fused_matmul, interpret=self.interpret)
        return multiply(
            x_ND,
            weight,
            norm=None if norm_D is None else Norm(norm_D, self.model.norm_eps),
            activate=activation(self.model) if self.parts == 2 else None,
            residual_NF=residual_NF,
        )

    def uncovered(self) -> str:
        if not self.by_pallas:
            return ""
        if self.kernel.rows > pallas_matmul.MOST_ROWS:
            return f"{self.kernel.rows} rows, of {pallas_matmul.MOST_ROWS} possible"
        return pallas_matmul.uncovered(jax.eval_shape(self.make)[0])


TRIALS: dict[str, type[Trial]] = {
    "decode_attention": Attention,
    "prefill_attention": Attention,
    "rotate_and_write": Rotate,
    "small_matmul": Product,
}


def _weight_shape(model: ModelConfig, weight: str) -> tuple[int, int, int]:
    D, K, J, C = model.hidden_size, model.num_kv_heads, model.group_size + 2, model.head_dim
    F, heads = model.mlp_size, model.num_heads
    return {
        "qkv": (D, 1, K * J * C),
        "out": (heads * C, 1, D),
        "gate_up": (D, 2, F),
        "down": (F, 1, D),
    }[weight]
