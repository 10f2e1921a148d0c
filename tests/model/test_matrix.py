"""Weights in the form that a kernel reads are the checkpoint's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.checkpoint.quantize import quantize
from model.kernel_choice import XLA, Kernels, kernels_for
from model.loading import load_weights
from model.panels import COLUMNS, panel_shape
from model.partition import Partition, abstract_weights
from model.weights import quantized, shapes, summed_axes
from sharding.mesh import MeshShape, make_meshes
from tests.serve.harness import DENSE, MOE, ArraySource, random_weights

WIDE = replace(DENSE, hidden_size=64, head_dim=16, mlp_size=96, vocab_size=128)
WIDE_MOE = replace(MOE, hidden_size=64, head_dim=16, vocab_size=128)
CPU = kernels_for("cpu")


def test_columns_that_do_not_divide_stay_as_they_are():
    assert panel_shape((7, 3, COLUMNS)) == (3, 7, COLUMNS)
    assert panel_shape((7, COLUMNS + 1)) is None


def loaded(config, kernels: Kernels, mesh: MeshShape, dtype: str = "float32"):
    """What a checkpoint becomes on a mesh, by name; experts apart are lists."""
    partition = Partition(config, mesh.stage, mesh.tensor)
    arrays = random_weights(config)
    devices = make_meshes(mesh)[0]
    source, dtypes = ArraySource(arrays), jnp.dtype(dtype)
    tree = load_weights(partition, source, devices, dtypes, kernels=kernels)
    _, abstract = abstract_weights(partition, dtypes, kernels)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    found: dict[str, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [str(key.key) for key in path if hasattr(key, "key")]
        found.setdefault(".".join(keys), []).append(np.asarray(leaf, np.float32))
    return arrays, found


def natural(panels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Panels, [..., P, D, C], as the weight that they are of."""
    return panels.reshape(panels.shape[-3:]).swapaxes(0, 1).reshape(shape)


@pytest.mark.parametrize("config", [WIDE, WIDE_MOE], ids=["dense", "experts"])
def test_one_cpu_has_every_weight_in_the_form_its_kernel_reads(config):
    arrays, found = loaded(config, CPU, MeshShape())
    num_panelled = 0
    for name, shape in shapes(config).items():
        for i, leaf in enumerate(found[name]):
            expected = arrays[name][i] if len(found[name]) > 1 else arrays[name]
            if leaf.shape[-len(shape) :] != shape:
                num_panelled += 1
                leaf = natural(leaf, expected.shape)
            np.testing.assert_array_equal(leaf.reshape(expected.shape), expected, name)
    # Of five layers gate_up and down of four experts.
    assert num_panelled == (0 if config is WIDE else 5 * 2 * 4)


@pytest.mark.parametrize(("kernels", "mesh"), [(XLA, MeshShape()), (CPU, MeshShape(tensor=2))])
def test_others_have_experts_as_the_checkpoint_does(kernels, mesh):
    arrays, found = loaded(WIDE_MOE, kernels, mesh)
    for i in range(WIDE_MOE.num_layers):
        name = f"layers.{i}.moe.gate_up"
        np.testing.assert_array_equal(found[name][0][0], arrays[name])


def test_quantized_experts_are_apart_and_their_scales_are_not():
    config = replace(WIDE_MOE, quantization="int8")
    _, abstract = abstract_weights(Partition(config, 1, 1), jnp.dtype("bfloat16"), CPU)
    moe = abstract["layers"][0]["moe"]
    E, D, _, F = quantized(config)["layers.0.moe.gate_up"]
    assert [leaf.shape for leaf in jax.tree.leaves(moe["gate_up"])] == E * [(1, 1, D, 2 * F)]
    assert moe["gate_up_scale"].shape == (1, E, 2, F)


@pytest.mark.parametrize(
    ("kernels", "mesh", "dtype"),
    [(XLA, MeshShape(), "float8_e4m3fn"), (CPU, MeshShape(tensor=2), "bfloat16")],
)
def test_fp8_numbers_are_the_checkpoints_where_a_cpu_has_them_wide(kernels, mesh, dtype):
    config, arrays = replace(WIDE, quantization="fp8"), random_weights(WIDE)
    for name in quantized(config):
        numbers, scale = quantize(arrays[name], summed_axes(name), "fp8", name)
        arrays |= {name: numbers, f"{name}_scale": scale}
    partition = Partition(config, mesh.stage, mesh.tensor)
    source, devices = ArraySource(arrays), make_meshes(mesh)[0]
    tree = load_weights(partition, source, devices, jnp.dtype("bfloat16"), kernels=kernels)
    down, scale = (tree["layers"][1]["mlp"][place][...] for place in ("down", "down_scale"))
    assert (down.dtype, scale.dtype) == (dtype, "float32")
    expected = arrays["layers.1.mlp.down"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(down[0], np.float32), expected)
    assert len(np.unique(expected)) > 50
