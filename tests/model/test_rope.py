import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from model import rope as untyped
from model.config import LinearScaling, Llama3Scaling, Rope, YarnScaling

checked = jaxtyped(typechecker=beartype)
apply_rope = checked(untyped.apply_rope)
inverse_frequencies = checked(untyped.inverse_frequencies)
rope_angles = checked(untyped.rope_angles)

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
YARN = YarnScaling(
    factor=32.0, beta_fast=32.0, beta_slow=1.0, original_context=4096, attention_factor=1.35
)


def plain(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def llama3(frequency: float) -> float:
    wavelength = 2 * math.pi / frequency
    turns = LLAMA3.original_context / wavelength
    if turns > LLAMA3.high_freq_factor:
        return frequency
    if turns < LLAMA3.low_freq_factor:
        return frequency / LLAMA3.factor
    smooth = (turns - 1) / (4 - 1)
    return (1 - smooth) * frequency / LLAMA3.factor + smooth * frequency


def yarn(i: int, frequency: float, low: float, high: float) -> float:
    stretched = min(max((i - low) / (high - low), 0), 1)
    return frequency * (1 - stretched) + frequency / YARN.factor * stretched


@pytest.mark.parametrize(
    ("rope", "head_dim", "expected"),
    [
        (Rope(10_000.0), 96, plain(1e4, 96)),
        (Rope(1e6, LinearScaling(8.0)), 128, [f / 8 for f in plain(1e6, 128)]),
        (Rope(5e5, LLAMA3), 128, [llama3(f) for f in plain(5e5, 128)]),
        # The pairs that turn 32 times and once within 4096 positions are 8.09 and 17.40.
        (Rope(150_000.0, YARN), 64, [yarn(i, f, 8, 18) for i, f in enumerate(plain(1.5e5, 64))]),
    ],
)
def test_frequencies_are_those_of_the_formula_within_float32(rope, head_dim, expected):
    found, factor = inverse_frequencies(rope, head_dim)
    assert found.dtype == np.float32
    # A few roundings of 6e-8 each, and one of the exponent, which ln(theta) = 14 magnifies.
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert factor == (1.35 if rope.scaling is YARN else 1.0)


def test_yarn_untruncated_keeps_the_fractional_band():
    exact = YarnScaling(32.0, 32.0, 1.0, 4096, 1.0, truncate=False)
    found, _ = inverse_frequencies(Rope(150_000.0, exact), 64)
    low, high = (
        32 * math.log(4096 / (turns * 2 * math.pi)) / math.log(150_000.0) for turns in (32, 1)
    )
    expected = [yarn(i, f, low, high) for i, f in enumerate(plain(150_000.0, 64))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rotation_is_that_of_complex_numbers(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 16)).astype(dtype)
    positions = rng.integers(0, 500, (2, 5))
    inv_freq, _ = inverse_frequencies(Rope(10_000.0), 16)
    cos, sin = rope_angles(jnp.asarray(positions), jnp.asarray(inv_freq), 1.25)
    found = apply_rope(jnp.asarray(x), cos, sin)

    pairs = x[..., :8].astype(np.float64) + 1j * x[..., 8:].astype(np.float64)
    turned = 1.25 * pairs * np.exp(1j * positions[..., None, None] * inv_freq.astype(np.float64))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    assert found.dtype == dtype
    # float32: angles up to 500 are rounded by 3e-5; bfloat16: the result is, by 2**-9 of it.
    rtol, atol = (0, 2e-4) if dtype == np.float32 else (2**-8, 2e-4)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=atol)


def test_position_zero_turns_nothing():
    x = jnp.arange(16.0).reshape(1, 1, 16)
    cos, sin = rope_angles(jnp.zeros(1, jnp.int32), jnp.ones(8), 1.0)
    np.testing.assert_array_equal(apply_rope(x, cos, sin), x)
