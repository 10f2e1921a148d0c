"""What a checkpoint looks like from inside: named tensors in Weft's layout, read region by region.

It does not know files (`hugging_face`, `orbax_store`) or devices (`sharding`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Index = tuple[slice, ...]


class CheckpointError(Exception):
    """A checkpoint that is absent, damaged, or not what its configuration says."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a tensor, from `start` on, on their way to another checkpoint."""

    name: str
    start: int
    array: np.ndarray


class TensorSource(Protocol):
    """A checkpoint opened for reading, shared by threads; names are those of `model/weights.py`."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The region `index` of a tensor, not to be written to; axes left out of it are whole."""
        ...


def resolve(index: Index, shape: tuple[int, ...]) -> Index:
    """`index` with a start and a stop on every axis of `shape`."""
    padded = index + (slice(None),) * (len(shape) - len(index))
    ranges = [part.indices(size) for part, size in zip(padded, shape, strict=True)]
    if any(step != 1 for _, _, step in ranges):
        raise ValueError(f"index {index} has a step; regions are read whole")
    return tuple(slice(start, max(start, stop)) for start, stop, _ in ranges)
