"""A digest of everything that decides a compiled step: equal keys, equal programs.

Where it can't be known what matters, more counts than need be. It does not know where programs are
kept.
"""

import hashlib
import os
import platform
from contextlib import suppress
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from model.step import StepShape
from serve.programs import Programs

SOURCES = (
    "model/*.py",
    "model/kernels/*.py",
    "sharding/*.py",
    "serve/packing.py",
    "serve/program_*.py",
    "serve/programs.py",
)
"""The code that makes programs of configurations, and what is kept of programs."""
DISTRIBUTIONS = (
    "jax",
    "jaxlib",
    "flax",
    *(f"{name}-cu{major}" for major in (12, 13) for name in ("nvidia-cudnn", "nvidia-cublas")),
    *(f"jax-cuda{major}-{name}" for major in (12, 13) for name in ("plugin", "pjrt")),
)
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
WHERE_JAX_KEEPS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
"""JAX's settings that decide no program."""

OF_A_PROCESSOR = ("vendor", "model", "flags", "CPU ", "Features")
"""Lines of /proc/cpuinfo that say what it is, not how it fares; the last two are ARM's."""


def program_key(programs: Programs, shape: StepShape) -> str:
    """In hexadecimal digits."""
    mesh = programs.mesh
    first = mesh.devices.flat[0]
    settings = jax.config.values.items()
    decided = {
        "sources": _sources(),
        "versions": _versions(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "settings": sorted((k, v) for k, v in settings if k not in WHERE_JAX_KEEPS),
        "platform": first.client.platform_version,
        "host": _host() if first.platform == "cpu" else "any",
        "mesh": dict(mesh.shape),
        "devices": [(device.id, device.device_kind) for device in mesh.devices.flat],
        "kernels": programs.kernels,
        "shape": shape,
    }
    for field in fields(programs):
        if field.name != "mesh":
            decided[field.name] = getattr(programs, field.name)
    return hashlib.sha256(repr(decided).encode()).hexdigest()


@cache
def _sources() -> str:
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def _host() -> tuple[object, ...]:
    """What XLA compiles for where the processor is the device: its instructions, and its cores."""
    try:
        described = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        described = [platform.processor()]
    kind = [line for line in described if line.startswith(OF_A_PROCESSOR)]
    return platform.machine(), len(os.sched_getaffinity(0)), *kind
