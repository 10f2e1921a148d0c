"""The two parts every block is made of: a product with a weight, and an RMS norm.

They do not know where the weight came from or how it is cut.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num


@dataclass(frozen=True)
class Matrix:
    """A weight as it is stored: its numbers, and for a quantized one what they are multiplied by.

    A scale is of an output channel, so it is taken once, after the product.
    """

    numbers: Num[Array, "..."]
    scale: Float[Array, "..."] | None = None
    """Float32, of the numbers' shape without the axes that a product sums over."""

    def as_product(self, parts: int = 1, num_summed: int = 1) -> "Matrix":
        """As [depth, parts, width], and its scale as [parts, width]; it sums over first axes."""
        depth = math.prod(self.numbers.shape[:num_summed])
        numbers = self.numbers.reshape(depth, parts, -1)
        return Matrix(numbers, None if self.scale is None else self.scale.reshape(parts, -1))

    def flat(self) -> "Matrix":
        """A weight [depth, parts, width] as [depth, parts * width]."""
        numbers = self.numbers.reshape(len(self.numbers), -1)
        return Matrix(numbers, None if self.scale is None else self.scale.reshape(-1))


def matmul(x: Float[Array, "*N D"], weight: Float[Array, "D F"]) -> Float[Array, "*N F"]:
    """x @ weight, exact to the dtype: float32 is never rounded to TF32 on the way."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, weight, precision=precision)


def multiply(x: Float[Array, "*N D"], weight: Matrix) -> Float[Array, "*N F"]:
    """x @ weight, [D, F]; of a quantized one the scale is taken before the result is rounded."""
    if weight.scale is None:
        return matmul(x, weight.numbers)
    numbers = weight.numbers.astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    wide = jnp.matmul(x, numbers, precision=precision, preferred_element_type=jnp.float32)
    return (wide * weight.scale).astype(x.dtype)


@dataclass(frozen=True)
class Norm:
    """An RMS norm: x over its root mean square, times (weight + offset)."""

    weight: Float[Array, " D"]
    eps: float
    offset: float = 0.0


def rms_norm(x: Float[Array, "*N D"], norm: Norm) -> Float[Array, "*N D"]:
    """x normalized over its last axis; computed in float32."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + norm.eps)
    return (x32 * scale * (norm.weight.astype(jnp.float32) + norm.offset)).astype(x.dtype)
