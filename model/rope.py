"""Rotary position embedding: its frequencies, the angles of positions, and the rotation.

It does not know layers; which frequencies a layer uses is its configuration's business.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.config import LinearScaling, Llama3Scaling, Rope, YarnScaling


def inverse_frequencies(
    rope: Rope, head_dim: int
) -> tuple[Float[np.ndarray, " {head_dim}//2"], float]:
    """Radians per position for each pair of channels, and the factor on cos and sin.

    Each step is rounded to float32, as in transformers: at position 200,000 a rounding more or less
    is 0.01 radians. The power alone goes through float64, as NumPy's float32 one varies by machine.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / periods
    match rope.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor):
            return frequencies / np.float32(factor), 1.0
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(periods, rope.theta, scaling), scaling.attention_factor


def rope_angles(
    positions: Int[Array, "*N"], inv_freq: Float[Array, " half"], factor: float | Float[Array, ""]
) -> tuple[Float[Array, "*N half"], Float[Array, "*N half"]]:
    """cos and sin of every position's angles, times `factor`; float32."""
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float[Array, "*N H C"], cos: Float[Array, "*N C//2"], sin: Float[Array, "*N C//2"]
) -> Float[Array, "*N H C"]:
    """x with each pair of channels (i, i + C/2) turned by its angle; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Short waves stay, long ones are stretched, and between them a linear blend of both."""
    context, factor = np.float32(scaling.original_context), np.float32(scaling.factor)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / frequencies
    blend = (context / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    stretched = np.where(wavelengths > context / low, frequencies / factor, blended)
    return np.where(wavelengths < context / high, frequencies, stretched)


def _yarn(periods: np.ndarray, theta: float, scaling: YarnScaling) -> np.ndarray:
    """Channels that turn often within the original context stay, rare turners are stretched."""
    num_pairs = len(periods)

    def pair_turning(times: float) -> float:
        """The (fractional) pair of channels that turns `times` times in the original context."""
        period = scaling.original_context / (times * 2 * math.pi)
        return num_pairs * math.log(period) / math.log(theta)

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    width = high - low or 0.001  # a band of no width would divide by zero
    ramp = (np.arange(num_pairs, dtype=np.float32) - np.float32(low)) / np.float32(width)
    kept = 1 - np.clip(ramp, 0, 1)
    return 1 / (np.float32(scaling.factor) * periods) * (1 - kept) + 1 / periods * kept
