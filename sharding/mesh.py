"""The mesh a model is served on, from its one-line spelling to `jax.sharding.Mesh`.

It does not know which meshes a model divides over (`model/partition.py`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

STAGE, TENSOR = "stage", "tensor"


class MeshError(ValueError):
    """A mesh that cannot be made; says which could."""


@dataclass(frozen=True)
class MeshShape:
    """How many devices each axis takes. Replicas along `data` share nothing."""

    data: int = 1
    stage: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if size < 1:
                raise MeshError(f"mesh axis {axis} is {size}; it must be 1 or more")

    @property
    def devices_per_replica(self) -> int:
        return self.stage * self.tensor

    @property
    def num_devices(self) -> int:
        return self.data * self.devices_per_replica

    def __str__(self) -> str:
        sizes = [f"{axis}={size}" for axis, size in asdict(self).items() if size > 1]
        return ",".join(sizes) or "one device"


def parse_mesh(text: str) -> MeshShape:
    """`"stage=2,tensor=2"` as a MeshShape; axes left out are 1."""
    sizes: dict[str, int] = {}
    for item in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = item.partition("=")
        if axis not in ("data", STAGE, TENSOR) or not size.isdecimal() or axis in sizes:
            raise MeshError(
                f"mesh {text!r}: {item!r} is not data=N, stage=N or tensor=N, each at most once"
            )
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def make_meshes(shape: MeshShape, devices: Sequence[Any] | None = None) -> list[jax.sharding.Mesh]:
    """One mesh of axes (stage, tensor) for each replica along `data`, on the first devices."""
    devices = jax.devices() if devices is None else devices
    if shape.num_devices > len(devices):
        platform = devices[0].platform
        hint = (
            f"; set XLA_FLAGS=--xla_force_host_platform_device_count={shape.num_devices}"
            if platform == "cpu"
            else ""
        )
        raise MeshError(
            f"mesh {shape} takes {shape.num_devices} devices, there are {len(devices)} "
            f"({platform}){hint}"
        )
    grid = np.array(devices[: shape.num_devices], dtype=object)
    return [
        jax.sharding.Mesh(replica, (STAGE, TENSOR))
        for replica in grid.reshape(shape.data, shape.stage, shape.tensor)
    ]
