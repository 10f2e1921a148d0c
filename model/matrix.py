"""Weights of products as a module holds them: the numbers and, of quantized ones, their scale.

It does not know what multiplies with them (`model/linear.py`, `model/kernels`).
"""

import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.linear import Matrix
from model.weights import QUANTIZED_DTYPES, Shape, scale_shape


def add_matrix(
    module: nnx.Module, name: str, shape: Shape, config: ModelConfig, dtype: jnp.dtype
) -> None:
    """Gives `module` the weight `name`, such as attention.qkv, under the last part of its name."""
    place, stored = name.rpartition(".")[2], dtype
    if config.quantization is not None:
        stored = QUANTIZED_DTYPES[config.quantization]
        scale = jnp.zeros(scale_shape(name, shape), jnp.float32)
        setattr(module, f"{place}_scale", nnx.Param(scale))
    setattr(module, place, nnx.Param(jnp.zeros(shape, stored)))


def matrix(module: nnx.Module, place: str) -> Matrix:
    """What `add_matrix` gave it."""
    scale = getattr(module, f"{place}_scale", None)
    return Matrix(getattr(module, place)[...], None if scale is None else scale[...])
