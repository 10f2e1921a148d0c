"""Attention over pages against dense attention, one query at a time, in float64."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import paged_attention, write_pages
from model.kernels.paged_attention import DECODE_BLOCK as BLOCK

NO_WINDOW = 2**30
NUM_PAGES, PAGE_SIZE, WIDTH = 400, 16, 64
K, G, C = 2, 3, 8

attend = jax.jit(paged_attention, static_argnames=("scale", "softcap"))


@dataclass(frozen=True)
class Case:
    """Rows over one pool of pages."""

    q_RTKGC: np.ndarray
    k_PpKC: np.ndarray
    v_PpKC: np.ndarray
    tables_RW: np.ndarray
    starts_R: np.ndarray
    lengths_R: np.ndarray
    window: int = NO_WINDOW
    softcap: float | None = None
    sinks_KG: np.ndarray | None = None
    scale: float = 0.4

    def run(self, dtype: jnp.dtype = jnp.float32) -> np.ndarray:
        arrays = [jnp.asarray(x, dtype) for x in (self.q_RTKGC, self.k_PpKC, self.v_PpKC)]
        places = [
            jnp.asarray(x, jnp.int32) for x in (self.tables_RW, self.starts_R, self.lengths_R)
        ]
        out = attend(
            *arrays,
            *places,
            scale=self.scale,
            window=jnp.int32(self.window),
            softcap=self.softcap,
            sinks_KG=None if self.sinks_KG is None else jnp.asarray(self.sinks_KG, dtype),
        )
        assert out.shape == (*self.q_RTKGC.shape[:-1], self.v_PpKC.shape[-1])
        assert out.dtype == dtype
        return np.asarray(out, np.float64)

    def expected(self, row: int, t: int) -> np.ndarray:
        """[K, G, C]: the row's query t over the keys it may see."""
        at = self.starts_R[row] + t
        seen = range(max(0, at - self.window + 1), at + 1)
        places = [(self.tables_RW[row, j // PAGE_SIZE], j % PAGE_SIZE) for j in seen]
        k_SKC = np.array([self.k_PpKC[place] for place in places], np.float64)
        v_SKC = np.array([self.v_PpKC[place] for place in places], np.float64)
        scores = self.scale * np.einsum("kgc,skc->kgs", self.q_RTKGC[row, t], k_SKC)
        if self.softcap is not None:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if self.sinks_KG is not None:
            scores = np.concatenate([scores, self.sinks_KG[..., None]], axis=-1)
            v_SKC = np.concatenate([v_SKC, np.zeros_like(v_SKC[:1])])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("kgs,skc->kgc", weights, v_SKC)

    def check(self, tolerance: float = 1e-5, dtype: jnp.dtype = jnp.float32) -> None:
        found = self.run(dtype)
        for row, length in enumerate(self.lengths_R):
            for t in range(length):
                np.testing.assert_allclose(
                    found[row, t], self.expected(row, t), rtol=0, atol=tolerance
                )

    @property
    def owned(self) -> np.ndarray:
        """Which places of the pages hold a row's tokens."""
        owned = np.zeros((NUM_PAGES, PAGE_SIZE), bool)
        for row, end in enumerate(self.starts_R + self.lengths_R):
            for j in range(end if self.lengths_R[row] else 0):
                owned[self.tables_RW[row, j // PAGE_SIZE], j % PAGE_SIZE] = True
        return owned


def case(starts, lengths, num_new: int, seed: int = 0, **options) -> Case:
    """Rows in pages dealt at random; rows beyond their pages point to the null page."""
    rng = np.random.default_rng(seed)
    ends = np.add(starts, lengths)
    pages = iter(rng.permutation(np.arange(1, NUM_PAGES)))
    tables = np.zeros((len(starts), WIDTH), np.int64)
    for row, end in enumerate(ends):
        for i in range(-(-int(end) // PAGE_SIZE)):
            tables[row, i] = next(pages)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return Case(
        normal(len(starts), num_new, K, G, C),
        normal(NUM_PAGES, PAGE_SIZE, K, C),
        normal(NUM_PAGES, PAGE_SIZE, K, C),
        tables,
        np.array(starts),
        np.array(lengths),
        **options,
    )


def sinks(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((K, G)).astype(np.float32)


DECODE = [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 77]
"""Starts of decode rows, whose blocks go from the first to the last."""


@pytest.mark.parametrize("window", [NO_WINDOW, 1, 20, BLOCK, 300])
def test_decode_rows_are_as_dense_attention(window):
    case([*DECODE, 0], [1, 1, 1, 1, 1, 0], 1, window=window).check()


@pytest.mark.parametrize("window", [NO_WINDOW, 1, 3, 300])
def test_prefill_rows_are_as_dense_attention(window):
    case([0, 250, 2 * BLOCK, 900, 0, 17], [5, 5, 3, 1, 0, 4], 5, window=window).check()


@pytest.mark.parametrize("window", [NO_WINDOW, 40])
def test_loop_that_starts_beyond_the_first_blocks_misses_nothing(window):
    """No short row: with a window, the first blocks are not visited at all."""
    case(
        [3 * BLOCK - 1, 3 * BLOCK + 39, 3 * BLOCK + 40, 1000, 990, 800], [1] * 6, 1, window=window
    ).check()


def test_row_that_sees_nothing_in_another_rows_blocks_is_unharmed():
    case([0, 1000, 3, 1, 2, 600], [1] * 6, 1, window=2, seed=3).check()


@pytest.mark.parametrize("num_new", [1, 5])
@pytest.mark.parametrize("window", [NO_WINDOW, 7])
def test_softcap_and_sinks_are_as_dense_attention(num_new, window):
    lengths = [min(num_new, n) for n in (1, 5, 2, 5, 0, 3)]
    some = case([0, 30, 255, 700, 0, 512], lengths, num_new, window=window)
    replace(some, softcap=3.0, sinks_KG=sinks()).check()


def test_table_of_one_block_is_as_dense_attention():
    some = case([0, 9, 63, 64, 0, 100], [1, 1, 1, 1, 0, 1], 1)
    replace(some, tables_RW=some.tables_RW[:, :8]).check()


def test_table_that_blocks_do_not_divide_is_as_dense_attention():
    some = case([0, 9, 300, 799, 0, 780], [1, 1, 1, 1, 0, 1], 1)
    replace(some, tables_RW=some.tables_RW[:, :50]).check()


@pytest.mark.parametrize("num_new", [1, 5])
def test_values_may_be_narrower_than_keys(num_new):
    some = case([0, 300, 17], [num_new] * 3, num_new)
    replace(some, v_PpKC=some.v_PpKC[..., :5]).check()


def test_rows_share_pages():
    """As after a fork: the first 64 tokens are the same, then each row has its own."""
    some = case([70, 80, 64, 65, 0, 300], [1] * 6, 1)
    tables = some.tables_RW.copy()
    tables[1:4, :4] = tables[0, :4]
    shared = replace(some, tables_RW=tables)
    shared.check()
    assert not np.allclose(shared.run()[1], some.run()[1])


def test_row_does_not_depend_on_its_neighbours():
    some = case([*DECODE, 0], [1, 1, 1, 1, 1, 0], 1)
    full = some.run()
    for row in range(5):
        idle = np.where(np.arange(6) == row, 1, 0)
        starts = np.where(idle, some.starts_R, 0)
        tables = np.where(idle[:, None], some.tables_RW, 0)
        by_itself = replace(some, starts_R=starts, lengths_R=idle, tables_RW=tables).run()
        np.testing.assert_array_equal(by_itself[row], full[row])


@pytest.mark.parametrize("num_new", [1, 5])
def test_bfloat16_is_as_close_as_its_eight_bits(num_new):
    """Inputs are rounded to bfloat16 first; its weights and result then err by 2**-9 of about 3."""
    lengths = [min(num_new, n) for n in (1, 5, 2, 5, 0, 3)]
    some = case([0, 30, 255, 700, 0, 512], lengths, num_new)
    rounded = {
        name: np.asarray(jnp.asarray(getattr(some, name), jnp.bfloat16), np.float32)
        for name in ("q_RTKGC", "k_PpKC", "v_PpKC")
    }
    replace(some, **rounded).check(tolerance=2e-2, dtype=jnp.bfloat16)


def test_pages_may_be_narrower_than_the_queries():
    """Keys and values in bfloat16 under float32 queries are widened, not the queries narrowed."""
    some = case([*DECODE, 0], [1, 1, 1, 1, 1, 0], 1)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in (some.k_PpKC, some.v_PpKC))
    wide = replace(some, k_PpKC=np.asarray(k, np.float32), v_PpKC=np.asarray(v, np.float32))
    places = [jnp.asarray(x, jnp.int32) for x in (some.tables_RW, some.starts_R, some.lengths_R)]
    found = attend(jnp.asarray(some.q_RTKGC), k, v, *places, scale=0.4, window=jnp.int32(NO_WINDOW))
    np.testing.assert_allclose(found[:5], wide.run()[:5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("garbage", [3e38, -3e38, 1e-40])
@pytest.mark.parametrize("num_new", [1, 5])
@pytest.mark.parametrize("window", [NO_WINDOW, 40])
def test_what_others_left_in_pages_does_not_leak(garbage, num_new, window):
    """Pages come uncleared from their last owner, and padding is written to the null page."""
    lengths = [min(num_new, n) for n in (1, 5, 2, 5, 0, 3)]
    some = case([0, 30, 255, 700, 0, 512], lengths, num_new, window=window)
    spoil = lambda x: np.where(some.owned[..., None, None], x, np.float32(garbage))  # noqa: E731
    replace(some, k_PpKC=spoil(some.k_PpKC), v_PpKC=spoil(some.v_PpKC)).check()


@pytest.mark.parametrize("num_new", [1, 5])
def test_idle_rows_and_queries_past_a_length_give_finite_numbers(num_new):
    lengths = [min(num_new, n) for n in (1, 0, 2, 3, 0, 0)]
    found = case([0, 30, 255, 700, 0, 512], lengths, num_new, window=7).run()
    assert np.isfinite(found).all()


def test_one_rows_nan_stays_its_own():
    some = case([*DECODE, 0], [1, 1, 1, 1, 1, 0], 1)
    q_RTKGC = some.q_RTKGC.copy()
    q_RTKGC[2] = math.nan
    found, others = replace(some, q_RTKGC=q_RTKGC).run(), [0, 1, 3, 4]
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(found[others], some.run()[others])


def test_large_scores_do_not_overflow():
    """Scores of some 1e4, whose exponentials are infinite in float32."""
    some = case([*DECODE, 0], [1, 1, 1, 1, 1, 0], 1)
    replace(some, q_RTKGC=some.q_RTKGC * 1e4).check(tolerance=1e-3)


def test_write_pages_puts_each_token_in_its_place():
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((6, 4, K, C)).astype(np.float32)
    new = rng.standard_normal((5, K, C)).astype(np.float32)
    page, offset = np.array([[5, 1, 2, 1, 2], [3, 0, 3, 1, 0]], np.int32)
    found = write_pages(*map(jnp.asarray, (pages, new, page, offset)))
    for n in range(5):
        pages[page[n], offset[n]] = new[n]
    np.testing.assert_array_equal(found, pages)


def test_write_pages_rounds_to_the_pages_dtype():
    new = jnp.asarray(np.random.default_rng(0).standard_normal((2, K, C)), jnp.float32)
    found = write_pages(jnp.zeros((2, 4, K, C), jnp.bfloat16), new, *jnp.asarray([[0, 1], [0, 3]]))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[1, 3], new[1].astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_pages_writes_nothing_that_is_not_finite(dtype):
    """A later owner of the page would read 0 x NaN where it sees nothing yet."""
    new = jnp.asarray([[[math.nan, 1.0, math.inf, -math.inf]]], jnp.float32)
    found = write_pages(jnp.ones((2, 4, 1, 4), dtype), new, *jnp.asarray([[1], [2]]))
    assert found[1, 2, 0].tolist() == [0, 1, 0, 0]
    assert found[1, 1].tolist() == [[1] * 4]


def test_write_pages_leaves_padding_on_the_null_page():
    """Several padding tokens share places there; no other page changes."""
    pages = jnp.ones((3, 4, K, C))
    found = write_pages(pages, jnp.full((3, K, C), 9.0), *jnp.asarray([[0, 0, 0], [0, 0, 3]]))
    np.testing.assert_array_equal(found[1:], pages[1:])
