"""A model's weights, read onto a mesh shard by shard.

Each device's part is read alone, in the layout of the equivalent model that divides
(`model/partition.py`). It does not know file formats (`model/checkpoint`).
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from model.attention import NO_WINDOW
from model.config import ModelConfig
from model.host_memory import Budget, aligned_as
from model.kernel_choice import XLA, Kernels
from model.panels import to_panels
from model.partition import Partition, abstract_weights, weight_name
from model.rope import inverse_frequencies
from model.weights import shapes
from sharding.mesh import STAGE, TENSOR
from sharding.rules import weight_spec

Region = tuple[slice, ...]


class Source(Protocol):
    """Where weights are read from; `model/checkpoint` has several."""

    def read(self, name: str, index: Region) -> np.ndarray: ...


LOADERS = 8
"""Shards read at once, memory allowing: small ones are all latency."""


def load_weights(
    partition: Partition,
    source: Source,
    mesh: Mesh,
    dtype: jnp.dtype,
    progress: Callable[[str, int], None] = lambda name, num_bytes: None,
    kernels: Kernels = XLA,
) -> Any:
    """The decoder's weights on `mesh`.

    `progress` is called with a weight's name and its bytes, all shards together.
    """
    _, abstract = abstract_weights(partition, dtype, kernels)
    weights: list[jax.Array] = []
    for name, weight in stream_weights(partition, source, mesh, abstract):
        weights.append(weight)
        progress(name, weight.nbytes)
    return jax.tree.unflatten(jax.tree.structure(abstract), weights)


def stream_weights(
    partition: Partition, source: Source, mesh: Mesh, abstract: Any
) -> Iterator[tuple[str, jax.Array]]:
    """The weights of the tree `abstract`, from `abstract_weights`, on `mesh`, each with its name.

    Each shard is read straight for its devices, several at once, and ahead of who takes them. What
    is on its way takes no more of the host's memory than a shard of the largest weight for each
    device.
    """
    assert dict(mesh.shape) == {STAGE: partition.stages, TENSOR: partition.tensor}
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = [(weight_name(path), _expert(path), leaf) for path, leaf in leaves]
    cuts = [NamedSharding(mesh, weight_spec(name)) for name, _, _ in leaves]
    shard_bytes = [
        math.prod(cut.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for cut, (_, _, leaf) in zip(cuts, leaves, strict=True)
    ]
    budget = Budget(max(shard_bytes) * mesh.devices.size)

    def placed(
        name: str, expert: int | None, leaf: Any, index: Region, holders: Any
    ) -> list[jax.Array]:
        read = _read_leaf(partition, source, name, expert, index, leaf.shape)
        shard = aligned_as(read, leaf.dtype)
        return jax.block_until_ready([jax.device_put(shard, device) for device in holders])

    def load(
        name: str, expert: int | None, leaf: Any, num_bytes: int, index: Region, holders: Any
    ) -> list[jax.Array]:
        with budget.taken(num_bytes):
            # What the host holds of it ends with that call, before another may take its place.
            return placed(name, expert, leaf, index, holders)

    with ThreadPoolExecutor(LOADERS) as pool:
        try:
            loads = deque(
                [
                    pool.submit(load, name, expert, leaf, num_bytes, index, holders)
                    for index, holders in _holders(cut, leaf.shape).items()
                ]
                for (name, expert, leaf), num_bytes, cut in zip(
                    leaves, shard_bytes, cuts, strict=True
                )
            )
            for (name, _, leaf), cut in zip(leaves, cuts, strict=True):
                yield name, _joined(cut, leaf.shape, loads.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _joined(
    cut: NamedSharding, shape: tuple[int, ...], shards: Sequence[Future[list[jax.Array]]]
) -> jax.Array:
    """The weight whose shards those are, once they have arrived."""
    arrays = [array for shard in shards for array in shard.result()]
    return jax.make_array_from_single_device_arrays(shape, cut, arrays)


def _holders(cut: NamedSharding, shape: tuple[int, ...]) -> dict[Region, list[Any]]:
    """By region of an array, the devices that hold it."""
    found: dict[Region, list[Any]] = {}
    for device, index in cut.addressable_devices_indices_map(shape).items():
        assert index is not None, "every device holds a region"
        found.setdefault(index, []).append(device)
    return found


def _expert(path: Any) -> int | None:
    """Which expert's weight it is, where they are apart."""
    return getattr(path[-1], "idx", None)


def _read_leaf(
    partition: Partition,
    source: Source,
    name: str,
    expert: int | None,
    index: Region,
    shape: tuple[int, ...],
) -> np.ndarray:
    """One device's part of a weight, in the form that the decoder has it in."""
    if expert is None:
        return _read_shard(partition, source, name, index, shape)
    stacked = (1, *shapes(partition.config)[name])
    whole = [slice(0, size) for size in stacked]
    whole[1] = slice(expert, expert + 1)
    weight = _read_shard(partition, source, name, tuple(whole), stacked)
    return to_panels(weight, shape[1:])[None]


def _read_shard(
    partition: Partition, source: Source, name: str, index: Region, shape: tuple[int, ...]
) -> np.ndarray:
    """One device's part of weight `name`, in the fitted model's layout."""
    index = tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True))
    in_layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if not in_layer:
        return _read_padded(partition, source, name, index)
    place, leaf = int(in_layer[1]), in_layer[2]
    stage, rest = index[0], index[1:]
    assert stage.stop - stage.start == 1, "a device holds one stage"
    layer = stage.start * partition.layers_per_stage + place
    if layer < partition.config.num_layers:
        constant = _constant(partition.config, layer, leaf)
        if constant is not None:
            return constant[None]
        return _read_fitted(partition, source, layer, leaf, rest)[None]
    if (constant := _constant(partition.config, 0, leaf)) is not None:
        return constant[None]
    return np.zeros([cut.stop - cut.start for cut in index], np.float32)


def _constant(config: ModelConfig, layer: int, leaf: str) -> np.ndarray | None:
    """A number of the configuration that travels with the weights."""
    inv_freq, factor = inverse_frequencies(config.layers[layer].rope, config.rope_dim)
    window = config.layers[layer].window
    constants = {
        "attention.inv_freq": inv_freq,
        "attention.rope_factor": np.asarray(factor),
        "attention.window": np.asarray(NO_WINDOW if window is None else window),
    }
    return constants.get(leaf)


def _read_padded(partition: Partition, source: Source, name: str, index: Region) -> np.ndarray:
    """A weight outside the layers; places past the vocabulary are zero."""
    axis = {"embedding": 0, "head": 1}.get(name)
    if axis is None:
        return source.read(name, index)
    cut, vocab = index[axis], partition.config.vocab_size
    real = slice(min(cut.start, vocab), min(cut.stop, vocab))
    part = source.read(name, (*index[:axis], real, *index[axis + 1 :]))
    missing = (cut.stop - cut.start) - (real.stop - real.start)
    return np.pad(part, [(0, missing if i == axis else 0) for i in range(part.ndim)])


def _read_fitted(
    partition: Partition, source: Source, layer: int, leaf: str, index: Region
) -> np.ndarray:
    """A layer's weight where kv heads may be repeated and experts split into pieces."""
    name = f"layers.{layer}.{leaf}"
    fit = _FITS.get(leaf)
    repeat = partition.kv_repeat if leaf.startswith("attention.") else partition.expert_pieces
    if fit is None or repeat == 1:
        return source.read(name, index)
    axis, take = fit
    shape = _whole_shape(partition.config, leaf)
    parts: list[np.ndarray] = []
    for i in range(index[axis].start, index[axis].stop):
        whole = tuple(slice(0, size) for size in shape)
        one = (*whole[:axis], slice(i // repeat, i // repeat + 1), *whole[axis + 1 :])
        parts.append(take(source.read(name, one), i % repeat, repeat, partition.config))
    joined = np.concatenate(parts, axis)
    return joined[(*index[:axis], slice(None), *index[axis + 1 :])]


def _whole_shape(config: ModelConfig, leaf: str) -> tuple[int, ...]:
    D, K, G, C = config.hidden_size, config.num_kv_heads, config.group_size, config.head_dim
    E, F = (config.experts.num_experts, config.experts.size) if config.experts else (0, 0)
    return {
        "attention.qkv": (D, K, G + 2, C),
        "attention.qkv_scale": (K, G + 2, C),
        "attention.qkv_bias": (K, G + 2, C),
        "attention.q_norm_all": (K, G, C),
        "attention.k_norm_all": (K, C),
        "attention.sinks": (K, G),
        "attention.out": (K, G, config.value_dim, D),
        "moe.gate_up": (E, D, 2, F),
        "moe.gate_up_scale": (E, 2, F),
        "moe.gate_up_bias": (E, 2, F),
        "moe.down": (E, F, D),
        "moe.down_scale": (E, D),
        "moe.down_bias": (E, D),
    }[leaf]


def _take(axis: int) -> Callable[..., np.ndarray]:
    """Piece `i` of `n` equal ones along `axis`."""
    return lambda x, i, n, config: np.split(x, n, axis)[i]


def _take_qkv(axis: int) -> Callable[..., np.ndarray]:
    """Piece `i` of `n` of a kv head's query heads, with its k and v."""

    def take(x: np.ndarray, i: int, n: int, config: ModelConfig) -> np.ndarray:
        group = config.group_size
        heads = [*range(i * group // n, (i + 1) * group // n), group, group + 1]
        return np.take(x, heads, axis)

    return take


# By weight: the axis of kv heads (or experts), and what one of its `n` pieces keeps.
_FITS: dict[str, tuple[int, Callable[..., np.ndarray]]] = {
    "attention.qkv": (1, _take_qkv(2)),
    "attention.qkv_scale": (0, _take_qkv(1)),
    "attention.qkv_bias": (0, _take_qkv(1)),
    "attention.q_norm_all": (0, _take(1)),
    "attention.k_norm_all": (0, lambda x, i, n, config: x),
    "attention.sinks": (0, _take(1)),
    "attention.out": (0, _take(1)),
    "moe.gate_up": (0, _take(3)),
    "moe.gate_up_scale": (0, _take(2)),
    "moe.gate_up_bias": (0, _take(2)),
    "moe.down": (0, _take(1)),
    "moe.down_scale": (0, lambda x, i, n, config: x),
    # Pieces are added up, so only the first carries the bias.
    "moe.down_bias": (0, lambda x, i, n, config: x if i == 0 else np.zeros_like(x)),
}
