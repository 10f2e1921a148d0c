"""Products with what stands around them, by every kernel, against NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import cpu_matmul, pallas_matmul, xla_matmul
from model.linear import Norm

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
    found = KERNELS[kernel](x, weight, norm=Norm(scale, EPS, OFFSET), activate=silu_times)

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
    found = KERNELS[kernel](x, weight, residual_NF=residual)
    assert_close(found, double(x) @ double(weight)[:, 0] + double(residual), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_product_alone_is_a_product(kernel):
    x, weight = numbers(0, 2, DEPTH, dtype="float32"), numbers(1, DEPTH, 1, 20, dtype="float32")
    expected = double(x) @ double(weight)[:, 0]
    np.testing.assert_allclose(double(KERNELS[kernel](x, weight)), expected, rtol=1e-4, atol=1e-4)


def test_depth_that_the_loop_does_not_divide_is_not_covered():
    assert "no multiple of 128" in pallas_matmul.uncovered(numbers(0, 1, 100, dtype="float32"))
    assert pallas_matmul.uncovered(numbers(0, 1, 128, dtype="float32")) == ""
