"""The Pallas kernel of attention, interpreted, against the reference over random shapes."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model.kernels import pallas_attention, xla_attention
from model.kernels.pallas_attention import Tiling
from tests.model.kernels.cases import NO_WINDOW, Shape, case, jit, jit_interpreted

CONTEXT = 160
"""Tokens of the longest row: several turns and splits, some of them empty."""

FEW = settings(max_examples=11, derandomize=True, phases=[Phase.generate])
"""Each example compiles for a second; the same ones come from the cache. None is shrunk."""

reference = jit(xla_attention.paged_attention)


@dataclass(frozen=True)
class Program:
    """What is compiled."""

    num_rows: int
    shape: Shape
    tiling: Tiling
    dtype: Any
    cached: Any
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True)
class Batch:
    """What it is run with."""

    starts: list[int]
    lengths: list[int]
    window: int


@st.composite
def programs(draw: st.DrawFn) -> Program:
    num_rows, page_size = draw(st.integers(1, 4)), draw(st.sampled_from([8, 16, 64]))
    table_width = -(-CONTEXT // page_size)
    shape = Shape(
        num_new=draw(st.sampled_from([1, 7, 16])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 9)),
        channels=draw(st.sampled_from([64, 72, 128, 256])),
        page_size=page_size,
        table_width=table_width,
        num_pages=num_rows * table_width + 1,
    )
    tiling = Tiling(
        queries=draw(st.sampled_from([16, 32])),
        keys=draw(st.sampled_from([16, 32, 64])),
        splits=draw(st.sampled_from([1, 2, 4, 8])),
        num_warps=4,
        num_stages=1,
    )
    return Program(
        num_rows,
        shape,
        tiling,
        dtype=draw(st.sampled_from([jnp.float32, jnp.bfloat16])),
        cached=draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])),
        softcap=draw(st.sampled_from([None, 3.0])),
        has_sinks=draw(st.booleans()),
    )


@st.composite
def batches(draw: st.DrawFn, program: Program) -> Batch:
    lengths = [draw(st.integers(0, program.shape.num_new)) for _ in range(program.num_rows)]
    starts = [draw(st.integers(0, CONTEXT - length)) for length in lengths]
    return Batch(starts, lengths, draw(st.sampled_from([NO_WINDOW, 1, 5, 33, 100])))


@given(data=st.data())
@FEW
def test_any_shape_is_as_the_reference(data):
    """In float32 sums differ in order; in bfloat16 weights and result are off by up to 2**-8 each.

    The reference is given the same queries in float32, so that the kernel's own rounding is seen.
    """
    program = data.draw(programs())
    kernel = jit_interpreted(pallas_attention.paged_attention, tiling=program.tiling)
    for seed in range(4):
        batch = data.draw(batches(program))
        head = (program.shape.kv_heads, program.shape.group)
        some = case(
            batch.starts,
            batch.lengths,
            program.shape,
            seed,
            window=batch.window,
            softcap=program.softcap,
            sinks_KG=np.linspace(-2, 2, math.prod(head)).reshape(head)
            if program.has_sinks
            else None,
            scale=program.shape.channels**-0.5,
            dtype=program.dtype,
            cached=program.cached,
        )
        found, expected = some.run(kernel), some.widened().run(reference)
        tolerance = (1e-5 if program.dtype == jnp.float32 else 2**-7) * np.abs(some.v_PpKU).max()
        asked = np.arange(program.shape.num_new) < some.lengths_R[:, None]
        np.testing.assert_allclose(found[asked], expected[asked], rtol=0, atol=tolerance)
        assert np.isfinite(found).all()
