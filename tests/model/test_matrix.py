"""Weights in the form that a kernel reads are the checkpoint's; so are the products with them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernel_choice import XLA, Kernels, kernels_for
from model.kernels import cpu_matmul, xla_matmul
from model.linear import Matrix, Norm
from model.panels import COLUMNS, panel_shape, to_panels
from model.partition import Partition, abstract_weights, load_weights
from model.weights import quantized, shapes
from sharding.mesh import MeshShape, make_meshes
from tests.serve.harness import DENSE, MOE, ArraySource, random_weights

WIDE = replace(DENSE, hidden_size=64, head_dim=16, mlp_size=96, vocab_size=128)
"""All its products divide into panels."""
WIDE_MOE = replace(MOE, hidden_size=64, head_dim=16, vocab_size=128)
CPU = kernels_for("cpu")


def test_columns_that_do_not_divide_stay_as_they_are():
    assert panel_shape((7, 3, COLUMNS), 1) == (3, 7, COLUMNS)
    assert panel_shape((2, 3, 5, 2 * COLUMNS), 3) == (2, 30, COLUMNS)
    assert panel_shape((7, COLUMNS + 1), 1) is None


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
    # Of five layers qkv and out, and gate_up of a dense one, or gate_up and down of four experts;
    # and the head. A dense down is one panel, which is as it was.
    assert num_panelled == 5 * 2 + 1 + (5 if config is WIDE else 5 * 2 * 4)


@pytest.mark.parametrize(
    ("kernels", "mesh", "dtype"),
    [(XLA, MeshShape(), "float32"), (CPU, MeshShape(tensor=2), "float32")],
)
def test_others_have_them_as_the_checkpoint_does(kernels, mesh, dtype):
    arrays, found = loaded(WIDE, kernels, mesh, dtype)
    down = np.stack([arrays[f"layers.{i}.mlp.down"] for i in range(WIDE.num_layers)])
    for i, expected in enumerate(down):
        np.testing.assert_array_equal(found[f"layers.{i}.mlp.down"][0][0], expected)


def test_only_float32_lies_in_panels():
    """In bfloat16 prefill would lose more than decode gains (docs/performance.md)."""
    _, found = loaded(WIDE, CPU, MeshShape(), "bfloat16")
    assert found["layers.0.mlp.down"][0].shape == (1, 96, 64)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_product_with_panels_is_the_product(rows):
    rng = np.random.default_rng(0)
    x, norm, residual = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((rows, 48), (48,), (rows, 2 * COLUMNS))
    )
    weight = rng.standard_normal((48, 1, 2 * COLUMNS)).astype(np.float32)
    stored = to_panels(weight, (2, 48, COLUMNS))
    around = {"norm": Norm(norm, 1e-5), "residual_NF": residual}
    found = cpu_matmul.fused_matmul(x, Matrix(jnp.asarray(stored), None, weight.shape), **around)
    expected = xla_matmul.fused_matmul(x, Matrix(jnp.asarray(weight)), **around)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_quantized_experts_are_apart_and_their_scales_are_not():
    config = replace(WIDE_MOE, quantization="int8")
    _, abstract = abstract_weights(Partition(config, 1, 1), jnp.dtype("bfloat16"), CPU)
    moe = abstract["layers"][0]["moe"]
    E, D, _, F = quantized(config)["layers.0.moe.gate_up"]
    assert [leaf.shape for leaf in jax.tree.leaves(moe["gate_up"])] == E * [(1, 1, D, 2 * F)]
    assert moe["gate_up_scale"].shape == (1, E, 2, F)
