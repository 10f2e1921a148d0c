"""Attention by others' kernels for Hopper, to compare ours with: FlashInfer's, FlashAttention 4.

`make comparators` builds them (tools/comparators); nothing serves with them. It does not know what
is compared or timed.
"""

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plan.ahead import once
from plan.attention_trial import Attention
from plan.described import NUM_CORES
from plan.flashinfer_work import Prompt, share_work
from plan.kinds.kernel import Kernel, KernelName, Operation
from plan.machine import ROOT

HEAD_DIM, GROUP_SIZE, PAGE_SIZE = 128, 4, 64
"""What they are compiled for: Llama 3.1 8B's heads, in the pages that are served. FlashAttention 3
takes any pages, and any number of heads of that width."""

FA4_PAGE_SIZES = (PAGE_SIZE, 128)
"""Of which it fetches the larger at once: they are its tile of keys."""

SCRATCH_BYTES = 2**20
"""Where a head's keys are split, each part takes about 1 kB; parts fill a GPU, a few hundred."""


def library(name: str) -> Path:
    """Where a kernel is, once it is built."""
    return ROOT / "build" / "comparators" / f"{name}.so"


class Comparator(Attention):
    """One library's function, which scales queries by 1 / sqrt(C), as our models do."""

    library_name: str

    def covered(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """What is asked for and what is possible, by name."""
        return {
            "dtype": (self.kernel.dtype, ("bfloat16",)),
            "head_dim": (self.model.head_dim, (HEAD_DIM,)),
            "window": (self.kernel.window, (0,)),
            "softcap": (self.kernel.softcap, (0,)),
            "sinks": (self.kernel.sinks, (False,)),
        }

    def uncovered(self) -> str:
        for name, (asked, possible) in self.covered().items():
            if asked not in possible:
                return f"{name} {asked}, only {' and '.join(map(str, possible))}"
        if not (path := library(self.library_name)).is_file():
            return f"a tree without {path.relative_to(ROOT)}, which make comparators builds"
        return ""


class Xqa(Comparator):
    """FlashInfer's decode, which splits the keys of few rows."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.library_name = f"xqa_{kernel.cache_dtype}"
        if kernel.cache_dtype == "float8_e4m3fn":
            # It rounds queries and weights to fp8, too, whose 3 bits are 6% at worst.
            self.tolerance = 0.1

    def covered(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        return super().covered() | {
            "cache_dtype": (self.kernel.cache_dtype, ("bfloat16", "float8_e4m3fn")),
            "page_size": (self.kernel.page_size, (PAGE_SIZE,)),
            "queries of a kv head": (self.model.group_size, (GROUP_SIZE,)),
        }

    def _attend(self, q, pages, tables_RW, starts_R, lengths_R, *_):
        scratch = jax.ShapeDtypeStruct((SCRATCH_BYTES,), jnp.uint8)
        call = jax.ffi.ffi_call(_target(self.library_name), (jax.typeof(q), scratch))
        # The parts that are done, of each head: zero before a call and after it, so that calls
        # which follow each other share one array. As an output in its place it would be lost where
        # XLA lets the call read a slice of the tables: such a fusion forgets the place.
        counts = jnp.zeros(self.kernel.rows * self.model.num_kv_heads, jnp.uint32)
        ends_R = (starts_R + lengths_R).astype(jnp.uint32)
        return call(q, pages.keys, pages.values, tables_RW, ends_R, counts)[0]


class Prefill(Comparator):
    """Prompts of bfloat16 pages, whose lengths are known here."""

    def covered(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        return super().covered() | {"cache_dtype": (self.kernel.cache_dtype, ("bfloat16",))}

    def _prompts(self, num_pages: int) -> list[Prompt]:
        """`num_pages` is the length of a row's page table."""
        firsts = np.flatnonzero(np.diff(self.sequence_R, prepend=-1))
        num_queries = self.kernel.prompt
        return [
            Prompt(num_queries, start + num_queries, row * self.length, row * num_pages)
            for row, start in zip(firsts.tolist(), self.starts_R[firsts].tolist(), strict=True)
        ]


class FlashAttention3(Prefill):
    """FlashInfer's prefill, whose work is shared out here."""

    library_name = "fa3"

    def _attend(self, q, pages, tables_RW, *_):
        tiles, shares = share_work(
            self._prompts(tables_RW.shape[1]), self.model.num_heads, NUM_CORES
        )
        call = jax.ffi.ffi_call(_target(self.library_name), jax.typeof(q))
        return call(q, pages.keys, pages.values, tables_RW, tiles, shares)


class FlashAttention4(Prefill):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.library_name = f"fa4_{kernel.page_size}"

    def covered(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        return super().covered() | {
            "page_size": (self.kernel.page_size, FA4_PAGE_SIZES),
            "queries of a kv head": (self.model.group_size, (GROUP_SIZE,)),
        }

    def _attend(self, q, pages, tables_RW, *_):
        prompts = self._prompts(tables_RW.shape[1])
        begins = [prompt.first_query for prompt in prompts] + [len(q) * self.length]
        num_queries = [prompt.num_queries for prompt in prompts]
        num_keys = [prompt.num_keys for prompt in prompts]
        call = jax.ffi.ffi_call(_target(self.library_name), jax.typeof(q))
        counts = (jnp.array(count, jnp.int32) for count in (begins, num_queries, num_keys))
        return call(q, pages.keys, pages.values, tables_RW, *counts)


COMPARATORS: dict[tuple[Operation, KernelName], type[Comparator]] = {
    ("decode_attention", "flashinfer"): Xqa,
    ("prefill_attention", "flashinfer"): FlashAttention3,
    ("prefill_attention", "flash_attention4"): FlashAttention4,
}


def _target(name: str) -> str:
    """What XLA knows the library's function by."""
    target = f"comparator_{name}"
    return once(target, partial(_register, target, library(name)))


def _register(target: str, path: Path) -> str:
    function = jax.ffi.pycapsule(ctypes.CDLL(str(path)).attend)
    jax.ffi.register_ffi_target(target, function, platform="CUDA")
    return target
