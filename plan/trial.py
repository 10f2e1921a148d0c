"""What a trial of an operation is: random numbers, a call of it, and a chain of calls.

A chain is a program of many calls, each of which meets other memory than the ones before: so that a
call's time is that of the kernel, not of its launch, and of memory, not of a cache. It knows no
operation (`plan/trials.py`), nor what is compared or timed (`plan/kernels.py`).
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

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

    @abstractmethod
    def refusal(self, *arguments: Any) -> str:
        """Why the kernel, one of ours or of 8 bits, can't take these; empty when it can."""

    def uncovered(self) -> str:
        """Why the kernel can't take this shape; empty when it can."""
        if not (self.by_pallas or self.kernel.kernel == "xla_8bit"):
            return ""
        said: list[str] = []
        jax.eval_shape(lambda: said.append(self.refusal(*self.make())))
        return said[0]

    @property
    def interpret(self) -> bool:
        return self.kernel.kernel == "pallas_interpreted"

    @property
    def by_pallas(self) -> bool:
        return self.kernel.kernel.startswith("pallas")

    def random(self, seed: int, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
        return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype or self.dtype)

    def weight(self, seed: int, shape: tuple[int, ...], summed: int = 0) -> tuple[jax.Array, ...]:
        """Of a product that sums over the axis `summed`: its numbers and, of 8 bits, its scale."""
        numbers, depth = self.random(seed, shape), shape[summed]
        if self.kernel.weight_dtype == "auto":
            return (numbers / depth**0.5,)
        spread = 30
        channels = shape[:summed] + shape[summed + 1 :]
        scale = (1 + self.random(seed + 1000, channels, jnp.float32) / 8) / spread
        return jnp.clip(numbers * spread, -127, 127).astype(self.stored), scale / depth**0.5

    @property
    def stored(self) -> jnp.dtype:
        """What a weight's numbers are of."""
        weight_dtype = self.kernel.weight_dtype
        return self.dtype if weight_dtype == "auto" else jnp.dtype(weight_dtype)

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
