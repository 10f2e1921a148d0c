"""A model cut over any mesh is the checkpoint's; what was repeated or split comes together."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from model import weights
from model.attention import NO_WINDOW
from model.config import Experts
from model.loading import load_weights
from model.partition import Partition, abstract_weights, fitting_meshes, misfit
from model.rope import inverse_frequencies
from sharding.mesh import MeshError, MeshShape, make_meshes, parse_mesh
from tests.assets import needs_assets
from tests.model.reference import FAMILY_NAMES, load_family
from tests.serve.harness import DENSE, LATENT, MOE, ArraySource, random_weights

MODELS = {"dense": DENSE, "experts": MOE, "latent": LATENT}
MESHES = ["", "tensor=2", "tensor=8", "stage=2", "stage=4", "stage=2,tensor=4"]
CONSTANTS = ("inv_freq", "rope_factor", "window")


def loaded(config, arrays, shape: MeshShape, dtype="float32"):
    """Every weight on the mesh, whole, by its name; a layer's with its stages in front."""
    partition = Partition(config, shape.stage, shape.tensor)
    tree = load_weights(partition, ArraySource(arrays), make_meshes(shape)[0], jnp.dtype(dtype))
    return named(tree)


def named(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path).removesuffix(".value"): leaf for path, leaf in leaves}


def of_layer(config, shape, found, layer, leaf):
    """A layer's weight as the mesh has it."""
    per_stage = -(-config.num_layers // shape.stage)
    return np.asarray(found[f"layers.{layer % per_stage}.{leaf}"])[layer // per_stage]


def joined(config, shape, leaf, array):
    """A fitted weight put together again: of K x n kv heads, or E x n experts, the checkpoint's."""
    K, G = config.num_kv_heads, config.group_size
    n = max(1, shape.tensor // K)
    match leaf:
        case "attention.qkv" | "attention.qkv_bias":
            axis = array.ndim - 3
            split, heads = np.split(array, K * n, axis), []
            for k in range(K):
                pieces = split[k * n : (k + 1) * n]
                queries = [np.take(piece, range(G // n), axis + 1) for piece in pieces]
                keys = [np.take(piece, (G // n, G // n + 1), axis + 1) for piece in pieces]
                assert all(np.array_equal(one, keys[0]) for one in keys)
                heads.append(np.concatenate([*queries, keys[0]], axis + 1))
            return np.concatenate(heads, axis)
        case "attention.out" | "attention.q_norm_all" | "attention.sinks":
            return array.reshape(K, G, *array.shape[2:])
        case "attention.k_norm_all":
            return array[::n]
    width_axes = {"gate_up": 3, "gate_up_bias": 2, "down": 1, "down_bias": None}
    if not leaf.startswith("moe.") or leaf.removeprefix("moe.") not in width_axes:
        return array
    E = config.experts.num_experts
    n = max(1, shape.tensor // E)
    width_axis = width_axes[leaf.removeprefix("moe.")]
    experts = [np.split(array, E * n)[e * n : (e + 1) * n] for e in range(E)]
    if width_axis is None:  # down_bias: pieces are added up
        return np.concatenate([sum(pieces) for pieces in experts])
    return np.concatenate([np.concatenate(pieces, width_axis) for pieces in experts])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_weights_on_a_mesh_are_the_checkpoints(model, mesh):
    config, shape = MODELS[model], parse_mesh(mesh)
    arrays = random_weights(config)
    found = loaded(config, arrays, shape)
    for name, array in arrays.items():
        if name in ("embedding", "head"):
            axis = ("embedding", "head").index(name)
            whole = np.asarray(found[name])
            real, padding = np.split(whole, [config.vocab_size], axis)
            np.testing.assert_array_equal(real, array)
            assert whole.shape[axis] % shape.devices_per_replica == 0
            assert not padding.any()
        elif name.startswith("layers."):
            _, layer, leaf = name.split(".", 2)
            fitted = of_layer(config, shape, found, int(layer), leaf)
            np.testing.assert_array_equal(joined(config, shape, leaf, fitted), array, name)
        else:
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("mesh", ["", "stage=2", "stage=4"])
def test_windows_and_rope_travel_with_their_layers(mesh):
    shape = parse_mesh(mesh)
    found = loaded(DENSE, random_weights(DENSE), shape)
    for i, layer in enumerate(DENSE.layers):
        constants = [of_layer(DENSE, shape, found, i, f"attention.{name}") for name in CONSTANTS]
        inv_freq, factor = inverse_frequencies(layer.rope, DENSE.head_dim)
        np.testing.assert_array_equal(constants[0], inv_freq)
        assert constants[1:] == [factor, NO_WINDOW if layer.window is None else layer.window]


def test_stage_without_a_layer_of_its_own_gets_one_of_zeros():
    shape = MeshShape(stage=4)  # five layers: two a stage, the last three of them padding
    found = loaded(DENSE, random_weights(DENSE), shape)
    for name, array in found.items():
        if name.startswith("layers.") and not name.endswith(CONSTANTS):
            stages = np.asarray(array)
            padding = [s for s in range(4) if 2 * s + int(name.split(".")[1]) >= 5]
            assert not stages[padding].any()
            assert all(stages[s].any() for s in range(4) if s not in padding)


@pytest.mark.parametrize("mesh", ["tensor=8", "stage=4", "stage=2,tensor=4"])
def test_no_device_holds_more_than_its_part(mesh):
    shape = parse_mesh(mesh)
    found = loaded(MOE, random_weights(MOE), shape)
    share = {"attention.qkv": shape.tensor, "attention.out": shape.tensor, "moe.down": shape.tensor}
    for leaf, parts in share.items():
        array = found[f"layers.0.{leaf}"]
        assert array.addressable_shards[0].data.size == array.size // parts // shape.stage
    table = found["embedding"]
    assert table.addressable_shards[0].data.size == table.size // shape.devices_per_replica


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_dtype_asked_for(dtype):
    arrays = random_weights(MOE)
    found = loaded(MOE, arrays, MeshShape(tensor=2), dtype)
    rounded = arrays["layers.0.attention.out"].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(found["layers.0.attention.out"])[0], rounded)
    assert found["layers.0.attention.inv_freq"].dtype == jnp.float32


def test_bias_that_chooses_experts_is_never_rounded():
    arrays = random_weights(LATENT)
    found = np.asarray(
        loaded(LATENT, arrays, MeshShape(), "bfloat16")["layers.0.moe.selection_bias"]
    )
    np.testing.assert_array_equal(found[0], arrays["layers.0.moe.selection_bias"])


def test_bfloat16_weights_are_served_as_float32_unchanged():
    arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in random_weights(DENSE).items()}
    found = loaded(DENSE, arrays, MeshShape())
    assert found["head"].dtype == jnp.float32
    np.testing.assert_array_equal(found["head"], arrays["head"].astype(np.float32))


@needs_assets
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_decoder_has_the_weights_of_the_layout_and_no_others(family):
    config, _ = load_family(family)
    _, abstract = abstract_weights(Partition(config, 1, 1), jnp.dtype("bfloat16"))
    found = {
        name: leaf.shape[1:] if name.startswith("layers.") else leaf.shape
        for name, leaf in named(abstract).items()
        if not name.endswith(CONSTANTS)
    }
    assert found == weights.shapes(config)


MIXED = replace(MOE, layers=(*MOE.layers[:3], *DENSE.layers[3:]))
MISFITS = {
    "8 query heads do not divide over tensor=3": (DENSE, 1, 3),
    "6 kv heads neither divide over tensor=4 nor divide it": (
        replace(DENSE, num_heads=12, num_kv_heads=6),
        1,
        4,
    ),
    "feed-forward width 36 does not divide over tensor=8": (replace(DENSE, mlp_size=36), 1, 8),
    "3 experts neither divide over tensor=4 nor divide it": (
        replace(MOE, experts=Experts(3, 2, 16, normalize=True)),
        1,
        4,
    ),
    "experts of width 15 do not split into 2 for tensor=8": (
        replace(MOE, experts=Experts(4, 2, 15, normalize=True)),
        1,
        8,
    ),
    "shared experts' width 24 does not divide over tensor=16": (
        replace(LATENT, num_heads=16, num_kv_heads=16),
        1,
        16,
    ),
    "5 layers are fewer than stage=8": (DENSE, 8, 1),
    "layers 0, 3, ... share a program but some are dense": (MIXED, 2, 1),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_mesh_that_does_not_fit_is_refused_with_the_meshes_that_do(reason):
    config, stages, tensor = MISFITS[reason]
    with pytest.raises(MeshError) as refused:
        Partition(config, stages, tensor)
    message = str(refused.value)
    assert message.startswith(f"mesh stage={stages},tensor={tensor} does not fit Tiny")
    assert reason in message
    _, _, listed = message.partition("up to 8 devices these fit: one device")
    assert listed
    for mesh in fitting_meshes(config, 8):
        assert misfit(config, mesh.stage, mesh.tensor) == ""
        assert str(mesh) in message
