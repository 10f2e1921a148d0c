"""Activations are rounded to the weight's 8 bits, row by row, and the rest is as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import xla_8bit_matmul, xla_matmul
from model.linear import Matrix

DTYPES = ("int8", "float8_e4m3fn")


def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight(dtype: str, depth: int, *shape: int) -> Matrix:
    numbers = jnp.asarray(random(1, depth, *shape) * 30).astype(dtype)
    return Matrix(numbers, jnp.abs(random(2, *shape)) / 500)


@pytest.mark.parametrize(
    ("dtype", "row", "rounded"),
    [
        ("int8", [127, 1.4, -2.6], [127, 1, -3]),
        # Of e4m3 there are 8 numbers from 16 to 30, 2 apart, and from 1 to 1.875, 0.125 apart.
        ("float8_e4m3fn", [448, 18.9, -1.2], [448, 18, -1.25]),
    ],
)
def test_each_row_has_a_step_of_its_own(dtype, row, rounded):
    x_ND = jnp.asarray([row, np.multiply(row, 1e-3)], jnp.float32)
    found = xla_8bit_matmul.multiply(x_ND, Matrix(jnp.eye(3).astype(dtype)))
    np.testing.assert_allclose(found, [rounded, np.multiply(rounded, 1e-3)], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_8_bits_hold_is_multiplied_exactly(dtype):
    """With all that stands around a product; sums of float32 are in another order."""
    x_ND = jnp.clip(random(0, 5, 64) * 30, -127, 127).astype(dtype).astype(jnp.float32)
    x_ND = x_ND.at[:, 0].set(xla_8bit_matmul.LARGEST[jnp.dtype(dtype)])
    cases = [
        (weight(dtype, 64, 2, 33), {"activate": silu_times}),
        (weight(dtype, 64, 1, 33), {"residual_NF": jnp.asarray(random(3, 5, 33))}),
    ]
    for of, around in cases:
        expected = xla_matmul.fused_matmul(x_ND, of, **around)
        found = xla_8bit_matmul.fused_matmul(x_ND, of, **around)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "x_dtype"), [(1, "float32"), (70, "float32"), (70, "bfloat16")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_no_further_off_than_its_numbers(dtype, rows, x_dtype):
    """And than results that are rounded to bfloat16, by 2**-9."""
    x_ND, of = jnp.asarray(random(0, rows, 256), x_dtype), weight(dtype, 256, 33)
    found = np.asarray(xla_8bit_matmul.multiply(x_ND, of), np.float64)
    x_ND = np.asarray(x_ND, np.float64)
    weight_DF = np.asarray(of.numbers.astype(jnp.float32), np.float64) * np.asarray(of.scale)
    away_ND = np.abs(x_ND) * 2**-4
    if dtype == "int8":
        half_N1 = np.abs(x_ND).max(axis=1, keepdims=True) / 127 / 2
        away_ND = np.broadcast_to(half_N1, x_ND.shape)
    expected = x_ND @ weight_DF
    most_NF = 1.001 * away_ND @ np.abs(weight_DF)
    most_NF += 2**-9 * np.abs(expected) if x_dtype == "bfloat16" else 0
    assert (np.abs(found - expected) <= most_NF).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_follow_x_into_its_extremes(dtype, magnitude):
    """Relative to an output's largest number: an eighth of the last place of 4 bits."""
    x_ND, of = random(0, 2, 256) * np.float32(magnitude), weight(dtype, 256, 33)
    expected = x_ND @ np.asarray(of.numbers.astype(jnp.float32), np.float64) * np.asarray(of.scale)
    found = np.asarray(xla_8bit_matmul.multiply(jnp.asarray(x_ND), of), np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.06 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_not_hidden(dtype):
    x_ND = jnp.asarray(random(0, 2, 64)).at[1, 3].set(jnp.nan)
    found = xla_8bit_matmul.multiply(x_ND, weight(dtype, 64, 5))
    np.testing.assert_array_equal(np.isnan(found), [[False] * 5, [True] * 5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_more_bits_are_not_covered(dtype):
    reason = xla_8bit_matmul.uncovered(Matrix(jnp.ones((4, 1, 4), dtype)))
    assert reason == f"weights in {dtype}, as a head's always are"
    assert not xla_8bit_matmul.uncovered(weight("int8", 4, 4))
