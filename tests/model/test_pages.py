"""Keys and values in pages, against an assignment in NumPy, and what each dtype of page keeps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import pages as pages_module
from model.pages import Pages, empty_pages
from tests.model.kernels.cases import read

K, C = 2, 8
write_pages = jax.jit(pages_module.write_pages)
stored = jax.jit(pages_module.stored, static_argnums=1)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def write(pages: Pages, k_NKC: np.ndarray, v_NKU: np.ndarray, page_N, offset_N) -> Pages:
    new = [jnp.asarray(x, jnp.float32) for x in (k_NKC, v_NKU)]
    return write_pages(pages, *new, *(jnp.asarray(x, jnp.int32) for x in (page_N, offset_N)))


def test_each_token_is_put_in_its_place():
    keys, values = random(6, 4, K, C), -random(6, 4, K, C)
    k_NKC, v_NKU = random(5, K, C), -random(5, K, C)
    page_N, offset_N = [5, 1, 2, 1, 2], [3, 0, 3, 1, 0]
    found = write(Pages(jnp.asarray(keys), jnp.asarray(values)), k_NKC, v_NKU, page_N, offset_N)
    for n in range(5):
        keys[page_N[n], offset_N[n]] = k_NKC[n]
        values[page_N[n], offset_N[n]] = v_NKU[n]
    np.testing.assert_array_equal(found.keys, keys)
    np.testing.assert_array_equal(found.values, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_token_is_written_with_another_on_the_null_page(dtype):
    """So that XLA on a CPU writes in place; no other page changes."""
    shape = (3, 4, K, C)
    pages = empty_pages(shape, shape, dtype)
    alone = read(write(pages, random(1, K, C), -random(1, K, C), [2], [3]))
    among = read(write(pages, random(2, K, C)[[0, 0]], -random(2, K, C)[[0, 0]], [1, 2], [1, 3]))
    for found, expected in zip(alone, among, strict=True):
        np.testing.assert_array_equal(found[2, 3], expected[2, 3])
        assert found[2, 3].any()
        assert not found[1].any()
        assert not found[2, :3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_stays_on_the_null_page(dtype):
    """Several padding tokens share places there."""
    shape = (3, 4, K, C)
    pages = empty_pages(shape, shape, dtype)
    found = write(pages, np.full((3, K, C), 9), np.full((3, K, C), 9), [0, 0, 0], [0, 0, 3])
    for cached in read(found):
        assert cached[0, 3].all()
        assert not cached[1:].any()


def test_values_may_be_narrower_than_keys():
    pages = empty_pages((2, 4, K, C), (2, 4, K, 3), jnp.int8)
    keys, values = read(write(pages, random(2, K, C), random(2, K, 3), [1, 1], [0, 1]))
    assert keys[1, :2].any(-1).all()
    assert values[1, :2].any(-1).all()
    assert values.shape == (2, 4, K, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_written_as_zero(dtype):
    """A later owner of the page would read 0 x NaN where it sees nothing yet."""
    shape = (2, 4, 1, 4)
    new = np.array([[[math.nan, 1.0, math.inf, -math.inf]]])
    keys, values = read(write(empty_pages(shape, shape, dtype), new, new, [1], [2]))
    for found in (keys, values):
        np.testing.assert_allclose(found[1, 2, 0], [0, 1, 0, 0], rtol=1e-6)
        assert not found[1, [0, 1, 3]].any()


def test_bfloat16_pages_hold_the_nearest_number():
    (found,), scales = stored([jnp.asarray(random(50, C))], jnp.bfloat16)
    assert scales is None
    np.testing.assert_array_equal(found, jnp.asarray(random(50, C)).astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e38])
def test_int8_pages_are_off_by_half_a_step(size):
    """A head's largest number is 127 steps; float32 makes the half a little more."""
    x = size * np.clip(random(50, K, C), -1, 1)
    (found,), scales = stored([jnp.asarray(x)], jnp.int8)
    np.testing.assert_allclose(scales, np.abs(x).max(-1) / 127, rtol=1e-6)
    steps = np.abs(np.asarray(found, np.float64) - x / np.asarray(scales, np.float64)[..., None])
    assert steps.max() <= 0.5 + 1e-4
    assert np.abs(found).max() == 127


def test_int8_pages_scale_all_parts_of_a_head_alike():
    x = random(50, C)
    whole, scales = stored([jnp.asarray(x)], jnp.int8)
    parts, same = stored([jnp.asarray(x[:, :4]), jnp.asarray(x[:, 4:])], jnp.int8)
    np.testing.assert_array_equal(scales, same)
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole[0])


def test_int8_pages_hold_a_head_of_zeros():
    (found,), scales = stored([jnp.zeros((2, C))], jnp.int8)
    assert np.isfinite(scales).all()
    assert not np.any(found)


@pytest.mark.parametrize(("dtype", "largest"), [(jnp.float8_e4m3fn, 448), (jnp.float8_e5m2, 57344)])
def test_fp8_pages_saturate(dtype, largest):
    """A plain conversion makes NaN or infinity of what is beyond the largest number."""
    (found,), _ = stored([jnp.asarray([1e5, -1e5, 3e38, 416.0])], dtype)
    finite = np.asarray(found.astype(jnp.float32))
    np.testing.assert_array_equal(np.abs(finite[:3]), largest)
    np.testing.assert_array_equal(np.sign(finite[:3]), [1, -1, 1])
    assert abs(finite[3] - 416) <= 32  # half a step of float8_e5m2 there
