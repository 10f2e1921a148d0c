"""Norm, rotation and write by both kernels, against the definitions in float64."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import pallas_rotate, xla_rotate
from model.linear import Norm
from model.pages import Pages, empty_pages
from tests.model.kernels.cases import QUICKLY, read

KERNELS = {
    "xla": xla_rotate.rotate_and_write,
    "pallas": partial(pallas_rotate.rotate_and_write, interpret=True),
}
F32, BF16, INT8, FP8 = jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn
NUM_PAGES, PAGE_SIZE = 6, 16
FACTOR = 1.25


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a layer's product gave for some tokens, and the norms that come next."""

    qkv_NKJC: np.ndarray
    norm_weights: tuple[np.ndarray, np.ndarray] | None
    offsets: tuple[float, float]
    dtype: Any
    cached: Any
    positions: tuple[int, ...] = (0, 31, 17, 5, 1000, 3, 3)
    pages: tuple[int, ...] = (1, 5, 4, 2, 3, 0, 0)
    """The last two tokens are padding; they meet on the null page."""
    eps: tuple[float, float] = (1e-3, 1e-1)
    """Of queries' norm and keys', each its own."""

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Pages and offsets."""
        return np.array(self.pages), np.array(self.positions) % PAGE_SIZE

    @property
    def inv_freq(self) -> np.ndarray:
        H = self.qkv_NKJC.shape[-1] // 2
        return (10_000.0 ** (-np.arange(H) / H)).astype(np.float32)

    def before(self) -> Pages:
        """Pages full of somebody's numbers."""
        _, K, _, C = self.qkv_NKJC.shape
        theirs = np.random.default_rng(9).integers(1, 100, (2, NUM_PAGES, PAGE_SIZE, K, C))
        scales = [jnp.full(theirs.shape[1:-1], 0.01)] * 2 if self.cached == INT8 else []
        return Pages(*(jnp.asarray(x, self.cached) for x in theirs), *scales)

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values in float64."""
        qkv = _rounded(self.qkv_NKJC, self.dtype)
        q_NKGC, k_NKC, v_NKC = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if self.norm_weights is not None:
            q_NKGC, k_NKC = (
                x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (weight + offset)
                for x, weight, eps, offset in zip(
                    (q_NKGC, k_NKC),
                    (_rounded(weight, self.dtype) for weight in self.norm_weights),
                    self.eps,
                    self.offsets,
                    strict=True,
                )
            )
        return self._rotated(q_NKGC), self._rotated(k_NKC), v_NKC

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Each pair of channels as a complex number; the angle is float32's, as everywhere."""
        angle_NH = np.float32(self.positions)[:, None] * self.inv_freq
        turn = FACTOR * np.exp(1j * angle_NH.astype(np.float64))
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * turn.reshape(
            len(x), *[1] * (x.ndim - 2), half
        )
        return np.concatenate([turned.real, turned.imag], axis=-1)


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x, dtype), np.float64)


def tokens(
    K: int, G: int, C: int, *, norms: bool, offset: float = 0.0, dtype: Any, cached: Any
) -> Tokens:
    rng = np.random.default_rng(0)
    weights = (1 - offset + 0.3 * rng.standard_normal(C), 1 - offset + 0.3 * rng.standard_normal(C))
    qkv_NKJC = 3 * rng.standard_normal((len(Tokens.positions), K, G + 2, C))
    return Tokens(qkv_NKJC, weights if norms else None, (offset, offset / 2), dtype, cached)


@cache
def run(kernel: str, some: Tokens) -> tuple[np.ndarray, Pages]:
    """Queries and pages as `kernel` has them."""

    def rotate(qkv_NKJC: jax.Array, weights: Any, *tokens: Any) -> tuple[jax.Array, Pages]:
        norms = weights and tuple(map(Norm, weights, some.eps, some.offsets))
        return KERNELS[kernel](qkv_NKJC, norms, *tokens)

    q_NKGC, pages = jax.jit(rotate, compiler_options=QUICKLY)(
        jnp.asarray(some.qkv_NKJC, some.dtype),
        some.norm_weights and tuple(jnp.asarray(w, some.dtype) for w in some.norm_weights),
        jnp.asarray(some.positions),
        jnp.asarray(some.inv_freq),
        jnp.float32(FACTOR),
        some.before(),
        jnp.asarray(some.pages),
    )
    assert q_NKGC.dtype == some.dtype
    return np.asarray(q_NKGC, np.float64), pages


CASES = {
    "plain": tokens(2, 4, 64, norms=False, dtype=F32, cached=F32),
    "norms": tokens(3, 3, 64, norms=True, dtype=F32, cached=F32),
    "norms with offset, 80 channels": tokens(
        1, 5, 80, norms=True, offset=1.0, dtype=F32, cached=BF16
    ),
    "one query head, bfloat16": tokens(3, 1, 128, norms=False, dtype=BF16, cached=BF16),
    "bfloat16 norms, 80 channels": tokens(2, 6, 80, norms=True, offset=1.0, dtype=BF16, cached=F32),
    "int8, 80 channels": tokens(2, 2, 80, norms=True, dtype=F32, cached=INT8),
    "int8, bfloat16": tokens(2, 3, 64, norms=False, dtype=BF16, cached=INT8),
    "fp8": tokens(3, 2, 128, norms=True, dtype=BF16, cached=FP8),
}
EVERY_CASE = pytest.mark.parametrize("some", CASES.values(), ids=CASES)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def rounding(some: Tokens, computed: np.ndarray) -> float:
    """In bfloat16 two results of the norm, then the rotation's are each off by up to 2**-8."""
    return (1e-6 if some.dtype == F32 else 2**-8 * (1 + 2**0.5)) * np.abs(computed).max()


@EVERY_CASE
def test_queries_are_normalized_and_rotated(kernel, some):
    found, expected = run(kernel, some)[0], some.expected()[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(some, expected))


@EVERY_CASE
def test_keys_and_values_are_written_in_their_places(kernel, some):
    """Off by what is computed, as queries, and by half a step of the pages."""
    _, pages = run(kernel, some)
    _, *expected = some.expected()
    owned = np.array(some.pages) > 0
    place = tuple(x[owned] for x in some.places)
    scales = (pages.key_scales, pages.value_scales)
    for cached, new, scale in zip(read(pages), expected, scales, strict=True):
        if scale is not None:
            half_step = np.asarray(scale)[place][..., None] / 2
        else:
            half_step = {F32: 0, BF16: 2**-8, FP8: 2**-4}[some.cached] * np.abs(new[owned])
        error = np.abs(cached[place] - new[owned])
        assert (error <= rounding(some, new) + half_step).all()


@EVERY_CASE
def test_no_other_place_changes(kernel, some):
    changed = np.zeros((NUM_PAGES, PAGE_SIZE), bool)
    changed[some.places] = True
    changed[0] = True
    before, after = read(some.before()), read(run(kernel, some)[1])
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[~changed], new[~changed])


def test_single_token_is_as_among_others(kernel):
    """Not bit by bit: other loops of XLA's fuse products and sums elsewhere."""
    some = CASES["norms"]
    alone = replace(some, qkv_NKJC=some.qkv_NKJC[4:5], positions=(1000,), pages=(3,))
    (q_NKGC, pages), (others_NKGC, others) = run(kernel, alone), run(kernel, some)
    np.testing.assert_allclose(q_NKGC[0], others_NKGC[4], rtol=0, atol=1e-5)
    for found, expected in zip(read(pages), read(others), strict=True):
        np.testing.assert_allclose(found[3], expected[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [F32, INT8, FP8])
def test_what_is_not_finite_is_written_as_zero(kernel, cached):
    """Both channels of a pair that is turned into NaN, and nothing else."""
    some = tokens(1, 1, 64, norms=False, dtype=F32, cached=cached)
    some.qkv_NKJC[0, 0, 1:, 7] = np.nan
    some.qkv_NKJC[1, 0, 2, 3] = np.inf
    keys, values = read(run(kernel, some)[1])
    assert np.isfinite(keys).all()
    assert np.isfinite(values).all()
    assert keys[1, 0, 0, 7] == keys[1, 0, 0, 39] == 0
    assert values[1, 0, 0, 7] == values[5, 15, 0, 3] == 0
    assert np.count_nonzero(values[1, 0]) > 50


def test_pallas_says_which_heads_it_does_not_cover():
    pages = empty_pages((2, 16, 1, 128), (2, 16, 1, 128), BF16)
    assert pallas_rotate.uncovered(jnp.zeros((1, 1, 62 + 2, 128)), pages) == ""
    found = pallas_rotate.uncovered(jnp.zeros((1, 1, 63 + 2, 128)), pages)
    assert found == "63 query heads of 128 channels share a kv head"


def test_cos_and_sin_are_computed_once_for_all_heads():
    N, K, G, C = 16, 4, 3, 64

    def rotate(qkv_NKJC: jax.Array, pages: Pages) -> tuple[jax.Array, Pages]:
        integers = jnp.arange(N)
        inv_freq, factor = jnp.ones(C // 2), jnp.ones(())
        q_NKGC, pages = xla_rotate.rotate_and_write(
            qkv_NKJC, None, integers, inv_freq, factor, pages, integers
        )
        return q_NKGC[:, :, :, None] * jnp.eye(K)[:, None, :, None], pages

    empty = (N, PAGE_SIZE, K, C)
    program = jax.jit(rotate).lower(jnp.ones((N, K, G + 2, C)), empty_pages(empty, empty, F32))
    fused = program.compile().as_text().split("\n\n")
    assert any(" cosine(" in computation for computation in fused)
    assert not any(" cosine(" in each and " concatenate(" in each for each in fused)
