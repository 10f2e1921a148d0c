"""Attention over pages, by every kernel, against dense attention of one query after the other."""

import math
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import cpu_attention, pallas_attention, xla_attention
from model.kernels.pallas_attention import Tiling
from model.pages import empty_pages
from tests.model.kernels.cases import NO_WINDOW, Case, Shape, case, jit, jit_interpreted

BLOCK = xla_attention.BLOCK

SPLIT = Tiling(queries=16, keys=16, splits=4, num_warps=4, num_stages=1)
"""Four programs share a tile's keys; of prefill rows a tile holds four tokens."""
KERNELS = {
    "xla": jit(xla_attention.paged_attention),
    "cpu": jit(cpu_attention.paged_attention),
    "cpu wide": jit(partial(cpu_attention.paged_attention, wide=2 * BLOCK)),
    "pallas": jit_interpreted(pallas_attention.paged_attention),
    "pallas split": jit_interpreted(pallas_attention.paged_attention, tiling=SPLIT),
}
EACH = pytest.mark.parametrize("attend", ["xla", "cpu", "pallas"], indirect=True)
"""Where splitting changes nothing."""

DECODE = [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 77, 0]
"""Starts of decode rows, whose blocks go from the first to the last; the last row is idle."""
ONE_EACH = [1, 1, 1, 1, 1, 0]

PREFILL = [0, 30, 2 * BLOCK - 1, 700, 0, 512]
SOME_EACH = [1, 5, 2, 5, 0, 3]
NUM_NEW = 5


@pytest.fixture(params=KERNELS)
def attend(request):
    return KERNELS[request.param]


def rows(num_new: int, **rules) -> Case:
    """Decode or prefill rows of every kind."""
    starts, lengths = (DECODE, ONE_EACH) if num_new == 1 else (PREFILL, SOME_EACH)
    return case(starts, lengths, Shape(num_new), **rules)


def sinks(scale: float = 1.0) -> np.ndarray:
    shape = Shape()
    rng = np.random.default_rng(1)
    return scale * rng.standard_normal((shape.kv_heads, shape.group)).astype(np.float32)


@pytest.mark.parametrize("num_new", [1, NUM_NEW])
@pytest.mark.parametrize("window", [NO_WINDOW, 1, 3, 20, BLOCK, 300])
def test_rows_are_as_dense_attention(attend, num_new, window):
    rows(num_new, window=window).check(attend)


@pytest.mark.parametrize("window", [NO_WINDOW, 40])
def test_loop_that_starts_beyond_the_first_blocks_misses_nothing(attend, window):
    """No short row: with a window, the first blocks are not visited at all."""
    starts = [3 * BLOCK - 1, 3 * BLOCK + 39, 3 * BLOCK + 40, 1000, 990, 800]
    case(starts, [1] * 6, Shape(), window=window).check(attend)


def test_row_that_sees_nothing_in_another_rows_blocks_is_unharmed(attend):
    case([0, 1000, 3, 1, 2, 600], [1] * 6, Shape(), seed=3, window=2).check(attend)


@pytest.mark.parametrize("num_new", [1, NUM_NEW])
@pytest.mark.parametrize("window", [NO_WINDOW, 7])
def test_softcap_and_sinks_are_as_dense_attention(attend, num_new, window):
    rows(num_new, window=window, softcap=3.0, sinks_KG=sinks()).check(attend)


@pytest.mark.parametrize("scale", [-100.0, 100.0])
def test_sink_that_outweighs_or_vanishes_is_as_dense_attention(attend, scale):
    """Counted once, however many programs share the keys."""
    rows(1, softcap=3.0, sinks_KG=scale * np.abs(sinks())).check(attend)


@EACH
def test_table_of_one_block_is_as_dense_attention(attend):
    some = case([0, 9, 63, 64, 0, 100], [1, 1, 1, 1, 0, 1], Shape(table_width=8))
    some.check(attend)


@EACH
def test_table_that_blocks_do_not_divide_is_as_dense_attention(attend):
    some = case([0, 9, 300, 799, 0, 780], [1, 1, 1, 1, 0, 1], Shape(table_width=50))
    some.check(attend)


@EACH
@pytest.mark.parametrize("num_new", [1, NUM_NEW])
def test_values_may_be_narrower_than_keys(attend, num_new):
    some = rows(num_new)
    replace(some, v_PpKU=some.v_PpKU[..., :5]).check(attend)


@EACH
def test_rows_share_pages(attend):
    """As after a fork: the first 64 tokens are the same, then each row has its own."""
    some = case([70, 80, 64, 65, 0, 300], [1] * 6, Shape())
    tables = some.tables_RW.copy()
    tables[1:4, :4] = tables[0, :4]
    shared = replace(some, tables_RW=tables)
    shared.check(attend)
    assert not np.allclose(shared.run(attend)[1], some.run(attend)[1])


def test_row_does_not_depend_on_its_neighbours(attend):
    some = rows(1)
    full = some.run(attend)
    for row in range(5):
        idle = np.where(np.arange(6) == row, 1, 0)
        starts = np.where(idle, some.starts_R, 0)
        tables = np.where(idle[:, None], some.tables_RW, 0)
        by_itself = replace(some, starts_R=starts, lengths_R=idle, tables_RW=tables).run(attend)
        np.testing.assert_array_equal(by_itself[row], full[row])


@EACH
@pytest.mark.parametrize("num_new", [1, NUM_NEW])
def test_bfloat16_is_as_close_as_its_eight_bits(attend, num_new):
    """Its weights and its result err by at most 2**-8 each, of values up to 4."""
    rows(num_new, dtype=jnp.bfloat16, cached=jnp.bfloat16).check(attend, tolerance=2**-7 * 4)


@EACH
@pytest.mark.parametrize("cached", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_pages_may_be_narrower_than_the_queries(attend, cached):
    """They are widened, not the queries narrowed: as exact as float32 for what the pages hold."""
    rows(1, cached=cached).check(attend)


@pytest.mark.parametrize("garbage", [3e38, -3e38, 1e-40])
@pytest.mark.parametrize("num_new", [1, NUM_NEW])
@pytest.mark.parametrize("window", [NO_WINDOW, 40])
def test_what_others_left_in_pages_does_not_leak(attend, garbage, num_new, window):
    """Pages come uncleared from their last owner, and padding is written to the null page."""
    some = rows(num_new, window=window)
    owned = some.owned[..., None, None]
    k_PpKC, v_PpKU = (np.where(owned, x, np.float32(garbage)) for x in (some.k_PpKC, some.v_PpKU))
    replace(some, k_PpKC=k_PpKC, v_PpKU=v_PpKU).check(attend)


@pytest.mark.parametrize("num_new", [1, NUM_NEW])
def test_idle_rows_and_queries_past_a_length_give_finite_numbers(attend, num_new):
    some = rows(num_new, window=7)
    lengths = np.minimum([1, 0, 2, 3, 0, 0], num_new)
    assert np.isfinite(replace(some, lengths_R=lengths).run(attend)).all()


def test_one_rows_nan_stays_its_own(attend):
    some = rows(1)
    q_RTKGC = some.q_RTKGC.copy()
    q_RTKGC[2] = math.nan
    found, others = replace(some, q_RTKGC=q_RTKGC).run(attend), [0, 1, 3, 4]
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(found[others], some.run(attend)[others])


def test_large_scores_do_not_overflow(attend):
    """Scores of some 1e4, whose exponentials are infinite in float32, and off by some 1e-3."""
    some = rows(1)
    replace(some, q_RTKGC=some.q_RTKGC * 1e4).check(attend, tolerance=1e-3)


@pytest.mark.parametrize(
    ("channels", "group", "values", "reason"),
    [
        (512, 1, 512, "512 channels"),
        (64, 1, 512, "512 channels"),
        (8, 1, 64, "8 channels"),
        (64, 200, 64, "200 query heads"),
        (256, 128, 16, ""),
        (12, 1, 9, ""),
    ],
)
def test_pallas_says_which_heads_it_does_not_cover(channels, group, values, reason):
    q_RTKGC = jnp.zeros((4, 1, 2, group, channels), jnp.bfloat16)
    pages = empty_pages((2, 16, 2, channels), (2, 16, 2, values), jnp.bfloat16)
    found = pallas_attention.uncovered(q_RTKGC, pages)
    assert reason in found
    assert bool(found) == bool(reason)
