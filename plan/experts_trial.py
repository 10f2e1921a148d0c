"""A layer's experts as they are tried: tokens that are routed at random, by one kernel.

It does not know what is compared or timed (`plan/kernels.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model import kernels
from model.kernel_choice import Kernels
from model.kernels import pallas_experts
from model.kernels.cpu_experts import MOST_APART
from model.linear import Matrix
from model.matrix import apart_shape
from model.mlp import activation
from plan.kinds.kernel import Kernel
from plan.trial import LONG_CALLS, MOST_CALLS, Trial


class Experts(Trial):
    """All experts of a layer, with weights of their own for each call at once."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        experts = self.model.experts
        assert experts is not None, "a kernel's settings refuse a model without experts"
        self.num_experts, self.top_k, self.size = experts.num_experts, experts.top_k, experts.size
        self.routed_EN = self._route()
        D, rows = self.model.hidden_size, kernel.rows
        expert = 3 * D * self.size
        weight_bytes = int(self.routed_EN.any(axis=1).sum()) * expert * self.stored.itemsize
        self.moved_bytes = weight_bytes + rows * D * (self.dtype.itemsize + 4)
        self.flops = 2 * rows * self.top_k * expert
        self.num_weights = min(MOST_CALLS // 2, max(2, kernel.cold_bytes // weight_bytes))
        self.num_calls = LONG_CALLS * self.num_weights

    def _route(self) -> np.ndarray:
        """Each token's weights on as many experts as it has."""
        rng = np.random.default_rng(0)
        shares_NA = rng.dirichlet(np.ones(self.top_k), self.kernel.rows)
        routed_EN = np.zeros((self.num_experts, self.kernel.rows), np.float32)
        for n, shares_A in enumerate(shares_NA):
            routed_EN[rng.permutation(self.num_experts)[: self.top_k], n] = shares_A
        return routed_EN

    def make(self) -> Any:
        E, D, F = self.num_experts, self.model.hidden_size, self.size
        shapes = ((E, D, 2, F), (E, F, D))
        stacked = [
            [self.weight(10 * i + j, shape, summed=1) for j, shape in enumerate(shapes)]
            for i in range(1, self.num_weights + 1)
        ]
        # The reference makes them for all kernels, of which a CPU's takes few experts apart.
        apart: list[Any] = []
        if jax.default_backend() == "cpu" and E <= MOST_APART:
            apart = [[_apart(*weight) for weight in pair] for pair in stacked]
        x_ND = self.random(0, (self.kernel.rows, D))
        return x_ND, jnp.asarray(self.routed_EN), stacked, apart

    def one(self, x_ND, routed_EN, stacked, apart):
        return self._compute(x_ND, routed_EN, self._own(stacked, apart)[0])

    def chain(self, x_ND, routed_EN, stacked, apart):
        def turn(_, i):
            # Other rows each time, or XLA would do it once.
            x = x_ND + i.astype(x_ND.dtype) * 1e-3
            own = self._own(stacked, apart)
            return [self._compute(x, routed_EN, weights) for weights in own], None

        empty = [jnp.zeros(x_ND.shape, jnp.float32)] * self.num_weights
        return lax.scan(turn, empty, jnp.arange(LONG_CALLS))[0]

    def _own(self, stacked, apart):
        """The weights in the form that the kernel takes."""
        if self.kernel.kernel == "cpu" and apart:
            return [[[Matrix(*one) for one in weight] for weight in pair] for pair in apart]
        return [[Matrix(*weight) for weight in pair] for pair in stacked]

    def _compute(self, x_ND, routed_EN, weights):
        return kernels.experts(
            Kernels(experts=self.kernel.kernel),
            x_ND,
            routed_EN,
            *weights,
            top_k=self.top_k,
            activate=activation(self.model),
        )

    def refusal(self, x_ND, routed_EN, stacked, apart) -> str:
        return pallas_experts.uncovered(*(Matrix(*weight) for weight in stacked[0]))


def _apart(numbers: jax.Array, *scales: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Each expert's, its numbers in panels."""
    panels, depth, columns = apart_shape(numbers.shape[1:], numbers.dtype)
    in_panels = numbers.reshape(-1, depth, panels, columns).swapaxes(1, 2)
    return list(zip(in_panels, *scales, strict=True))
