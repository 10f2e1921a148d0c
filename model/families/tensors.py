"""Rearrangements between a family's tensors and our weights, for the families' tables.

A rearrangement copies no more than fusing or reordering needs, and changes no number: unpacking is
the exact inverse of packing. Most know only the shape of our weight. It does not read files.

Linear layers are stored [out, in], sometimes with their bias, [out]; ours are [in, out].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model.config import ModelConfig
from model.weights import Pack, Shape, Unpack, Weight, shapes

Arrays = Sequence[np.ndarray]
Rearrangement = Callable[[Shape, ModelConfig], tuple[Pack, Unpack]]


@dataclass(frozen=True)
class Source:
    """Where a weight of ours comes from.

    Names of a layer's tensors lack their `model.layers.I.`. Names that hold `{expert}` stand for a
    tensor for each expert, and the rearrangement then makes one expert's slice of the weight.
    """

    tensors: tuple[str, ...]
    rearrangement: Rearrangement

    @property
    def by_expert(self) -> bool:
        return "{expert}" in self.tensors[0]


def weights_from(config: ModelConfig, sources: Mapping[str, Source]) -> list[Weight]:
    """Every weight of the model, made as `sources` say; they are named without their layer."""
    return [_weight(config, name, shape, sources) for name, shape in shapes(config).items()]


def _weight(config: ModelConfig, name: str, shape: Shape, sources: Mapping[str, Source]) -> Weight:
    prefix = ""
    kind = name
    if name.startswith("layers."):
        _, layer, kind = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    source = sources[kind]
    tensors = tuple(prefix + tensor for tensor in source.tensors)
    if not source.by_expert:
        return Weight(name, shape, (tensors,), *source.rearrangement(shape, config))
    experts = range(shape[0])
    parts = tuple(tuple(tensor.format(expert=i) for tensor in tensors) for i in experts)
    return Weight(name, shape, parts, *source.rearrangement(shape[1:], config))


def rearrangement(bind: Callable[[Shape], tuple[Pack, Unpack]]) -> Callable[..., Source]:
    """`bind` as a table writes it: a function of tensor names."""
    return lambda *tensors: Source(tensors, lambda shape, config: bind(shape))


@rearrangement
def same(shape: Shape) -> tuple[Pack, Unpack]:
    """One tensor, stored as it is kept."""
    return (lambda tensors: tensors[0]), (lambda weight: [weight])


@rearrangement
def flat(shape: Shape) -> tuple[Pack, Unpack]:
    """One tensor, stored with all its axes as one."""
    return (lambda tensors: tensors[0].reshape(shape)), (lambda weight: [weight.reshape(-1)])


@rearrangement
def linear(shape: Shape) -> tuple[Pack, Unpack]:
    """One linear layer; what it takes may have several axes of ours."""

    def pack(tensors: Arrays) -> np.ndarray:
        return tensors[0].T.reshape(shape)

    def unpack(weight: np.ndarray) -> Arrays:
        return [weight.reshape(-1, shape[-1]).T]

    return pack, unpack


def _heads(shape: Shape) -> tuple[Pack, Unpack]:
    def pack(tensors: Arrays) -> np.ndarray:
        return tensors[0].T.reshape(shape)

    def unpack(weight: np.ndarray) -> Arrays:
        return [weight.reshape(shape[0], -1).T]

    return pack, unpack


heads = rearrangement(_heads)
"""One linear layer; what it gives may have several axes of ours."""


def heads_of_rope_pairs(*tensors: str) -> Source:
    """As `heads`; the channels to be rotated stand in pairs of neighbours, ours half a width apart.

    Queries and keys are reordered alike, which leaves their products as they are.
    """

    def bind(shape: Shape, config: ModelConfig) -> tuple[Pack, Unpack]:
        pack, unpack = _heads(shape)
        fixed = shape[-1] - config.rope_dim
        pairs = np.arange(fixed, shape[-1]).reshape(-1, 2)
        order = np.concatenate([np.arange(fixed), pairs[:, 0], pairs[:, 1]])
        stored = np.argsort(order)
        return (
            lambda tensors: pack(tensors)[..., order],
            lambda weight: unpack(weight[..., stored]),
        )

    return Source(tensors, bind)


def _qkv(shape: Shape) -> tuple[Pack, Unpack]:
    *width, K, N, C = shape
    ours, stored = (-3, -2, -1), (0, 1, 2)

    def pack(tensors: Arrays) -> np.ndarray:
        heads = [tensor.reshape(K, -1, C, *width) for tensor in tensors]
        return np.moveaxis(np.concatenate(heads, axis=1), stored, ours)

    def unpack(weight: np.ndarray) -> Arrays:
        heads = np.split(np.moveaxis(weight, ours, stored), [N - 2, N - 1], axis=1)
        return [part.reshape(-1, *width) for part in heads]

    return pack, unpack


@rearrangement
def fused_qkv(shape: Shape) -> tuple[Pack, Unpack]:
    """One linear layer: all query heads, all keys, all values."""
    *_, K, N, C = shape
    pack, unpack = _qkv(shape)
    ends = [K * (N - 2) * C, K * (N - 1) * C]
    return (
        lambda tensors: pack(np.split(tensors[0], ends)),
        lambda weight: [np.concatenate(unpack(weight))],
    )


qkv = rearrangement(_qkv)
"""Three linear layers, or their biases: queries, keys, values."""


@rearrangement
def gate_up(shape: Shape) -> tuple[Pack, Unpack]:
    """Two linear layers, or their biases: gate, up."""

    def pack(tensors: Arrays) -> np.ndarray:
        return np.moveaxis(np.stack(tensors), (0, 1), (-2, -1))

    def unpack(weight: np.ndarray) -> Arrays:
        return list(np.moveaxis(weight, (-2, -1), (0, 1)))

    return pack, unpack


@rearrangement
def fused_gate_up(shape: Shape) -> tuple[Pack, Unpack]:
    """One linear layer: gate, then up."""
    *width, two, F = shape

    def pack(tensors: Arrays) -> np.ndarray:
        return np.moveaxis(tensors[0].reshape(two, F, *width), (0, 1), (-2, -1))

    def unpack(weight: np.ndarray) -> Arrays:
        return [np.moveaxis(weight, (-2, -1), (0, 1)).reshape(two * F, *width)]

    return pack, unpack


@rearrangement
def interleaved_gate_up(shape: Shape) -> tuple[Pack, Unpack]:
    """All experts' gate and up, or their biases, [..., in, out] with gate and up taking turns."""
    *front, two, F = shape

    def pack(tensors: Arrays) -> np.ndarray:
        return tensors[0].reshape(*front, F, two).swapaxes(-1, -2)

    def unpack(weight: np.ndarray) -> Arrays:
        return [weight.swapaxes(-1, -2).reshape(*front, F * two)]

    return pack, unpack
