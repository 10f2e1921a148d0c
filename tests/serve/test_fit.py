"""What is counted for a device is what the compiler counts, and the pool is what is left."""

import math
from dataclasses import replace

import jax
import pytest
from jax.sharding import NamedSharding

from model import partition as partitions
from model.config import ModelConfig
from model.weights import quantized, scale_shape
from serve.config import ConfigError, make_config
from serve.fit import Served, device_memory_bytes, fit, largest_shapes, num_devices_of
from serve.programs import activation_bytes, step_shapes
from sharding.mesh import MeshShape, make_meshes
from tests.serve.harness import DENSE, LATENT, MOE

SCHEDULE = {"max_batch": 2, "token_budget": 16, "chunk": 8, "max_steps": 2}
ROOM = 10_000_000
"""Bytes of a device in which the tiny models fit several times."""


def serve(of: ModelConfig = DENSE, **sections) -> Served:
    """The first two layers, which compile fast."""
    values = {"model": {"path": "nowhere"}, "schedule": SCHEDULE} | sections
    return Served(make_config(values, "test"), replace(of, layers=of.layers[:2]), "cpu")


def compile_step(served: Served, shape, num_pages: int):
    mesh = MeshShape(stage=served.partition.stages, tensor=served.partition.tensor)
    programs = served.programs(num_pages, make_meshes(mesh)[0], served.kernels)
    return programs.jit_step(shape).lower(*programs.abstract_arguments(shape)).compile()


@pytest.mark.parametrize(
    ("model", "mesh", "dtype"),
    [
        (DENSE, {"tensor": 8}, "fp8"),
        (MOE, {"stage": 2, "tensor": 2}, "int8"),
        (LATENT, {"tensor": 2}, "bfloat16"),
        (replace(DENSE, quantization="int8"), {"tensor": 2}, "auto"),
        (replace(DENSE, quantization="fp8"), {"tensor": 2}, "auto"),
    ],
)
def test_weights_state_and_pages_are_the_bytes_of_a_steps_arguments(model, mesh, dtype):
    served = serve(model, mesh=mesh, cache={"pages": 9, "dtype": dtype})
    found = fit(served, ROOM)
    shape = step_shapes(served.limits, served.partition.stages)[0]
    packed = served.programs(9, None, served.kernels).packing(shape)
    packed_bytes = 4 * packed.width * served.partition.stages
    memory = compile_step(served, shape, 9).memory_analysis()
    counted = found.weight_bytes + found.state_bytes + found.pool_bytes + packed_bytes
    assert memory.argument_size_in_bytes == counted


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("model", [DENSE, MOE, LATENT])
def test_weights_of_many_layers_are_counted_by_one_of_each_kind(model, tensor, monkeypatch):
    built = []

    def abstract_weights(partition, *rest):
        built.append(partition.config.num_layers)
        return partitions.abstract_weights(partition, *rest)

    monkeypatch.setattr("serve.fit.abstract_weights", abstract_weights)
    values = {"model": {"path": "nowhere"}, "mesh": {"tensor": tensor}}
    served = Served(make_config(values, "test"), model, "cpu")
    found = fit(served, ROOM)
    kinds = {layer.experts for layer in model.layers}
    assert built == [len(kinds)]
    assert len(kinds) < model.num_layers
    _, weights = partitions.abstract_weights(served.partition, served.dtype, served.kernels)
    cuts = jax.tree.leaves(partitions.weight_specs(weights), is_leaf=lambda x: x is None)
    mesh = make_meshes(MeshShape(tensor=tensor))[0]
    assert found.weight_bytes == sum(
        math.prod(NamedSharding(mesh, cut).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, cut in zip(jax.tree.leaves(weights), cuts, strict=True)
    )


@pytest.mark.parametrize(("platform", "item_bytes"), [("cpu", 4), ("gpu", 1)])
def test_fp8_weights_are_counted_as_wide_as_a_cpu_has_them(platform, item_bytes):
    served = replace(serve(replace(DENSE, quantization="fp8")), platform=platform)
    plain = fit(replace(served, model=replace(served.model, quantization=None)), ROOM)
    layers = quantized(served.model)
    scales = sum(math.prod(scale_shape(name, shape)) for name, shape in layers.items())
    numbers = sum(map(math.prod, layers.values()))
    narrower = numbers * (4 - item_bytes) - 4 * scales
    assert fit(served, ROOM).weight_bytes == plain.weight_bytes - narrower


# Of one row and one chunk: two steps of decode, and two of prefill.
FEWEST = {"max_batch": 1, "token_budget": 8, "chunk": 8, "max_steps": 2}


@pytest.fixture(scope="module")
def activations() -> dict:
    """By shape, of every step of a tiny model."""
    served = serve(schedule=FEWEST)
    shapes = step_shapes(served.limits, 1)
    return {shape: activation_bytes(compile_step(served, shape, 9)) for shape in shapes}


def test_no_step_needs_more_than_the_largest(activations):
    largest = largest_shapes(serve(schedule=FEWEST))
    assert len(activations) > len(largest) == 2
    assert max(activations.values()) == max(activations[shape] for shape in largest)


def test_activations_do_not_grow_with_the_pool(activations):
    served = serve(schedule=FEWEST)
    mixed = largest_shapes(served)[-1]
    assert activation_bytes(compile_step(served, mixed, 900)) == activations[mixed]


def test_a_pool_of_no_given_size_is_the_largest_that_a_start_may_plan_with():
    found = fit(serve(), 600_000)
    assert found.budget_bytes == int(600_000 * 0.3)  # a CPU's share
    assert found.num_pages == found.most_pages > 1
    assert found.short_bytes == 0
    one_more = replace(found, num_pages=found.num_pages + 1)
    assert 0 < one_more.short_bytes <= found.page_bytes


def test_a_pool_is_no_larger_than_full_slots_need():
    found = fit(serve(), 10**12)
    assert found.num_tokens == 2 * DENSE.max_context
    assert found.free_bytes > 10**11


def test_pages_that_are_asked_for_may_take_all_the_memory():
    served = serve(cache={"pages": 40})
    needed = fit(served, ROOM).needed_bytes
    exact = fit(served, needed)
    assert (exact.num_pages, exact.free_bytes, exact.short_bytes) == (40, 0, 0)
    assert fit(served, needed - 7).short_bytes == 7


def test_what_is_too_little_for_a_page_is_short_by_what_one_page_needs():
    found = fit(serve(cache={"memory_fraction": 0.5}), 1000)
    assert (found.num_pages, found.most_pages < 1) == (1, True)
    assert found.short_bytes == found.needed_bytes - 500


def test_the_compilers_figure_counts_against_all_the_memory():
    found = fit(serve(cache={"memory_fraction": 0.5}), ROOM)
    larger = replace(found, activation_bytes=found.reserved_bytes + found.free_bytes)
    assert (larger.free_bytes, larger.short_bytes) == (0, 0)
    assert replace(larger, activation_bytes=larger.step_bytes + 3).short_bytes == 3


def test_devices_of_a_cpu_share_its_memory():
    sections = {"mesh": {"data": 2, "tensor": 2}, "split": {"role": "decode", "prefill_tensor": 1}}
    config = make_config({"model": {"path": "x"}} | sections, "test")
    assert num_devices_of(config) == 2 * (2 + 1)
    device = jax.devices()[0]
    assert device_memory_bytes(device, 6) == device_memory_bytes(device, 1) // 6


def test_devices_that_know_their_memory_are_believed():
    class Gpu:
        def memory_stats(self):
            return {"bytes_limit": 12345}

    assert device_memory_bytes(Gpu(), 1) == 12345


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(ConfigError, match="max_context is 129, the model was made for 128; lower"):
        serve(model={"path": "nowhere", "max_context": 129})
