"""What JAX is told before its first use: memory, virtual CPU devices, where programs are kept."""

import os
from contextlib import suppress
from pathlib import Path

import jax

from serve.config import MeshSection

MEMORY_FRACTION = "0.95"
"""Of a GPU's memory; untold, JAX takes 0.75. The rest is for the driver, libraries and code."""
MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""What tells JAX, and its older name; JAX refuses both at once."""


def ensure_devices(mesh: MeshSection, beside: MeshSection | None = None) -> None:
    """Takes most of each GPU's memory, and makes as many CPU devices as the mesh takes, and one
    `beside` it.

    Not where the user has said how much, or how many. Only before JAX's first use of a device;
    afterwards there are those that there are.
    """
    if not any(os.environ.get(name) for name in MEMORY_VARIABLES):
        os.environ[MEMORY_VARIABLES[0]] = MEMORY_FRACTION
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with suppress(RuntimeError):
        sizes = [one.data * one.stage * one.tensor for one in (mesh, beside) if one]
        jax.config.update("jax_num_cpu_devices", sum(sizes))


def keep_compiled_programs() -> None:
    """Lets the next start find this one's programs, under ~/.cache/weft unless JAX was told where.

    Steps are kept there by `serve/program_cache.py`, the few other programs by JAX.
    """
    if jax.config.jax_compilation_cache_dir is None:
        directory = Path.home() / ".cache" / "weft" / "programs"
        # Nobody else's: what is read from there is run.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(directory))
    # Every program counts, however short its compiling.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
