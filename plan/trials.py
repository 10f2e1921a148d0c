"""The operations of `model/kernels` as they are tried, attention and experts aside.

It does not know what is compared or timed (`plan/kernels.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from model import kernels
from model.config import ModelConfig
from model.kernel_choice import Kernels
from model.kernels import pallas_matmul, pallas_rotate, xla_8bit_matmul, xla_rotate
from model.linear import Matrix, Norm
from model.mlp import activation
from plan.attention_trial import Attention
from plan.comparator_trial import COMPARATORS
from plan.experts_trial import Experts
from plan.kinds.kernel import Kernel
from plan.trial import AT_ONCE, LEAST_CALLS, LONG_CALLS, MOST_CALLS, Trial


def trial(kernel: Kernel) -> Trial:
    made = COMPARATORS.get((kernel.operation, kernel.kernel), TRIALS[kernel.operation])
    return made(kernel)


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

    def refusal(self, qkv, weights, positions_N, inv_freq_H, pages, page_N) -> str:
        return pallas_rotate.uncovered(qkv, pages)


class Product(Trial):
    """A layer's product, with a weight of its own for each call at once."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.depth, self.parts, self.width = _weight_shape(self.model, kernel.weight)
        self.has_norm = kernel.weight in ("qkv", "gate_up")
        weight_bytes = self.depth * self.parts * self.width * self.stored.itemsize
        numbers = self.depth + self.width * (1 if self.has_norm else 2)
        self.moved_bytes = weight_bytes + kernel.rows * numbers * self.dtype.itemsize
        self.flops = 2 * kernel.rows * self.depth * self.parts * self.width
        self.num_weights = min(MOST_CALLS // 2, max(2, kernel.cold_bytes // weight_bytes))
        self.num_calls = LONG_CALLS * self.num_weights
        if kernel.kernel == "xla_8bit":
            # x has 4 significant bits, and gate times up errors of both.
            self.tolerance = 0.1

    def make(self) -> Any:
        rows = self.kernel.rows
        shape = (self.depth, self.parts, self.width)
        return (
            self.random(0, (rows, self.depth)),
            [self.weight(10 + i, shape) for i in range(self.num_weights)],
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
        return kernels.fused_matmul(
            Kernels(small_matmul=self.kernel.kernel),
            x_ND,
            Matrix(*weight),
            norm=None if norm_D is None else Norm(norm_D, self.model.norm_eps),
            activate=activation(self.model) if self.parts == 2 else None,
            residual_NF=residual_NF,
        )

    def refusal(self, x_ND, weights, *_) -> str:
        if self.kernel.kernel == "xla_8bit":
            return xla_8bit_matmul.uncovered(Matrix(*weights[0]))
        if self.kernel.rows > pallas_matmul.MOST_ROWS:
            return f"{self.kernel.rows} rows, of {pallas_matmul.MOST_ROWS} possible"
        return pallas_matmul.uncovered(x_ND)


TRIALS: dict[str, type[Trial]] = {
    "decode_attention": Attention,
    "prefill_attention": Attention,
    "rotate_and_write": Rotate,
    "small_matmul": Product,
    "experts": Experts,
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
