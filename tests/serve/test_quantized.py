"""Weights in 8 bits: the tokens are those of the weights that they stand for, on every mesh."""

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from model.checkpoint.quantize import quantize
from model.config import ModelConfig
from model.kernel_choice import Kernels
from model.weights import quantized, summed_axes
from sharding.mesh import MeshShape, parse_mesh
from tests.serve.harness import (
    DENSE,
    LATENT,
    MOE,
    compile_few,
    generate,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)

CONFIGS = {"dense": DENSE, "experts": MOE, "latent": LATENT}
Arrays = Mapping[str, np.ndarray]


@functools.cache
def rounded(model: str, kind: str) -> tuple[ModelConfig, Arrays, Arrays]:
    """A quantized model, its arrays, and the float32 weights that these stand for."""
    config = replace(CONFIGS[model], quantization=kind)
    arrays = random_weights(CONFIGS[model])
    meant = dict(arrays)
    for name in quantized(config):
        numbers, scale = quantize(arrays[name], summed_axes(name), kind, name)
        arrays |= {name: numbers, f"{name}_scale": scale}
        meant[name] = numbers.astype(np.float32) * np.expand_dims(scale, summed_axes(name))
    return config, arrays, meant


def tokens(
    config: ModelConfig, arrays: Arrays, mesh: str = "", kernels: Kernels | None = None
) -> list[list[int]]:
    """Answers to prompts of which the longest takes two steps, the second beside decode rows."""
    shape = parse_mesh(mesh) if mesh else MeshShape()
    parts = make_parts(config, arrays, shape, kernels=kernels)
    compile_few(parts.runner)
    prompts = random_prompts(config, (1, 70, 17, 33))
    requests = [greedy(f"r{i}", prompt, 14) for i, prompt in enumerate(prompts)]
    answers = generate(parts.engine(), requests)
    return [answers[request.request_id].token_ids for request in requests]


@functools.cache
def expected(model: str, kind: str) -> list[list[int]]:
    _, _, meant = rounded(model, kind)
    return tokens(CONFIGS[model], meant)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("model", "mesh"),
    [("dense", ""), ("dense", "stage=2,tensor=4"), ("experts", "tensor=8"), ("latent", "tensor=2")],
)
def test_every_mesh_writes_the_tokens_of_what_the_numbers_stand_for(model, kind, mesh):
    config, arrays, _ = rounded(model, kind)
    assert tokens(config, arrays, mesh) == expected(model, kind)


@pytest.mark.parametrize("model", CONFIGS)
def test_the_reference_kernels_write_them_too(model):
    config, arrays, _ = rounded(model, "int8")
    assert tokens(config, arrays, kernels=Kernels()) == expected(model, "int8")


def test_rounding_is_not_without_effect():
    """Or the tests above would hold of weights that nobody reads."""
    config, arrays, _ = rounded("experts", "fp8")
    halved = {name: x / 2 if name.endswith("_scale") else x for name, x in arrays.items()}
    assert tokens(config, halved) != expected("experts", "fp8")
