"""Products with what stands around them, by every kernel, against NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import cpu_matmul, pallas_matmul, xla_matmul
from model.linear import Matrix, Norm

KERNELS = {
    "xla": xla_matmul.fused_matmul,
    "cpu": cpu_matmul.fused_matmul,
    "pallas": partial(pallas_matmul.fused_matmul, interpret=True),
}
EPS, OFFSET, DEPTH = 1e-5, 1.0, 2 * pallas_matmul.DEPTH


def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def numbers(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def double(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def assert_close(found: jax.Array, expected: np.ndarray, dtype: str) -> None:
    """bfloat16 rounds x once after the norm, hidden numbers and the result: 2**-8 of each."""
    tolerance = 1e-5 if dtype == "float32" else 2**-6
    assert found.dtype == dtype
    np.testing.assert_allclose(double(found), expected, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 48), (5, 70), (64, 16)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_norm_comes_before_and_activation_after(kernel, rows, columns, dtype):
    x = numbers(0, rows, DEPTH, dtype=dtype)
    weight = numbers(1, DEPTH, 2, columns, dtype=dtype) / 16
    scale = numbers(2, DEPTH, dtype=dtype)
    found = KERNELS[kernel](x, Matrix(weight), norm=Norm(scale, EPS, OFFSET), activate=silu_times)

    mean = (double(x) ** 2).mean(-1, keepdims=True)
    normed = double(x) / np.sqrt(mean + EPS) * (double(scale) + OFFSET)
    gate, up = (normed @ double(weight)[:, part] for part in range(2))
    assert_close(found, gate / (1 + np.exp(-gate)) * up, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_residual_is_added(kernel, rows, dtype):
    x, weight = numbers(0, rows, DEPTH, dtype=dtype), numbers(1, DEPTH, 1, 33, dtype=dtype) / 16
    residual = numbers(2, rows, 33, dtype=dtype)
    found = KERNELS[kernel](x, Matrix(weight), residual_NF=residual)
    assert_close(found, double(x) @ double(weight)[:, 0] + double(residual), dtype)


@pytest.mark.parametrize("quantized", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 48), (5, 70)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_quantized_weight_is_its_numbers_times_its_scale(kernel, rows, columns, dtype, quantized):
    x = numbers(0, rows, DEPTH, dtype=dtype)
    stored = (numbers(1, DEPTH, 2, columns, dtype="float32") * 30).astype(quantized)
    scale = jnp.abs(numbers(2, 2, columns, dtype="float32")) / 500
    found = KERNELS[kernel](x, Matrix(stored, scale), activate=silu_times)
    weight = double(stored.astype(jnp.float32)) * double(scale)
    gate, up = (double(x) @ weight[:, part] for part in range(2))
    expected = gate / (1 + np.exp(-gate)) * up
    if (kernel, quantized) == ("cpu", "int8"):
        # x has 15 bits there: a step of its largest number / 127 / 254, half of it at most.
        np.testing.assert_allclose(double(found), expected, rtol=2**-7, atol=2**-7)
    else:
        assert_close(found, expected, dtype)


@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e20])
def test_int8_products_follow_x_into_its_extremes(magnitude):
    x = numbers(0, 2, DEPTH, dtype="float32") * magnitude
    weight = Matrix((numbers(1, DEPTH, 33, dtype="float32") * 30).astype("int8"))
    expected = double(x) @ double(weight.numbers)
    found = double(cpu_matmul.multiply_int8(x, weight))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_int8_products_do_not_hide_what_is_not_a_number():
    x = numbers(0, 2, DEPTH, dtype="float32").at[1, 3].set(jnp.nan)
    found = cpu_matmul.multiply_int8(x, Matrix(jnp.ones((DEPTH, 5), jnp.int8)))
    np.testing.assert_array_equal(np.isnan(found), [[False] * 5, [True] * 5])


@pytest.mark.parametrize("kernel", KERNELS)
def test_product_alone_is_a_product(kernel):
    x, weight = numbers(0, 2, DEPTH, dtype="float32"), numbers(1, DEPTH, 1, 20, dtype="float32")
    expected = double(x) @ double(weight)[:, 0]
    np.testing.assert_allclose(
        double(KERNELS[kernel](x, Matrix(weight))), expected, rtol=1e-4, atol=1e-4
    )


def test_depth_that_the_loop_does_not_divide_is_not_covered():
    assert "no multiple of 128" in pallas_matmul.uncovered(numbers(0, 1, 100, dtype="float32"))
    assert pallas_matmul.uncovered(numbers(0, 1, 128, dtype="float32")) == ""
