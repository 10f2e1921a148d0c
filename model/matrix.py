"""Weights of products as a module holds them: quantized or not, in the form its kernel reads.

It does not know what multiplies with them (`model/kernels`).
"""

import math

import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.kernel_choice import Kernels
from model.linear import Matrix
from model.panels import panel_shape
from model.weights import QUANTIZED_DTYPES, Shape, scale_shape


def add_matrix(
    module: nnx.Module, name: str, shape: Shape, config: ModelConfig, dtype: jnp.dtype
) -> None:
    """Gives `module` the weight `name`, such as attention.qkv, under the last part of its name."""
    place = name.rpartition(".")[2]
    if config.quantization is not None:
        scale = jnp.zeros(scale_shape(name, shape), jnp.float32)
        setattr(module, f"{place}_scale", nnx.Param(scale))
        dtype = QUANTIZED_DTYPES[config.quantization]
    setattr(module, place, nnx.Param(jnp.zeros(shape, dtype)))


def matrix(module: nnx.Module, place: str) -> Matrix:
    """What `add_matrix` gave it."""
    scale = getattr(module, f"{place}_scale", None)
    return Matrix(getattr(module, place)[...], None if scale is None else scale[...])


def add_matrices(
    module: nnx.Module,
    name: str,
    shape: Shape,
    config: ModelConfig,
    dtype: jnp.dtype,
    kernels: Kernels,
) -> None:
    """Gives `module` the weight `name` of experts, [E, ...]: as one, or each expert's apart."""
    if kernels.experts != "cpu_apart":
        add_matrix(module, name, shape, config, dtype)
        return
    place = name.rpartition(".")[2]
    if config.quantization is not None:
        scale = jnp.zeros(scale_shape(name, shape), jnp.float32)
        setattr(module, f"{place}_scale", nnx.Param(scale))
        dtype = QUANTIZED_DTYPES[config.quantization]
    one = apart_shape(shape[1:], dtype)
    setattr(module, place, nnx.Param([jnp.zeros(one, dtype) for _ in range(shape[0])]))


def apart_shape(shape: Shape, dtype: jnp.dtype) -> Shape:
    """Of one expert's weight, whose first axis is summed over: in panels, or as a single one.

    A single one of int8, since that is copied at each product anyway.
    """
    panels = None if dtype == jnp.int8 else panel_shape(shape)
    return panels or (1, shape[0], math.prod(shape[1:]))


def matrices(module: nnx.Module, place: str) -> Matrix | list[Matrix]:
    """What `add_matrices` gave it."""
    numbers = getattr(module, place).get_value()
    if not isinstance(numbers, list):
        return matrix(module, place)
    scale = getattr(module, f"{place}_scale", None)
    scales = [None] * len(numbers) if scale is None else list(scale[...])
    return [Matrix(one, one_scale) for one, one_scale in zip(numbers, scales, strict=True)]


def num_matrices(module: nnx.Module, place: str) -> int:
    """Of how many experts they are."""
    return len(getattr(module, place).get_value())
