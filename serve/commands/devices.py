"""Virtual CPU devices for a mesh where there is no accelerator."""

import os
from contextlib import suppress

import jax

from serve.config import MeshSection


def ensure_devices(mesh: MeshSection) -> None:
    """Makes as many CPU devices as the mesh takes, unless the user has said how many.

    Only before JAX's first use of a device; afterwards there are those that there are.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", mesh.data * mesh.stage * mesh.tensor)
