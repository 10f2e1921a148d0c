"""Compiles for GPUs that are not there: an H200 host described in words, from one device to eight.

It needs the CUDA compiler (`weft[aot]`), no driver, and JAX_PLATFORMS=cpu where there is no GPU. It
can't time anything, and can't tune: what XLA chooses by timing (tiles, Triton against cuBLAS) may
differ on a device.
"""

import functools
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.stages import Compiled

from sharding.mesh import MeshError, MeshShape, make_meshes

KIND, NUM_CORES, MAX_DEVICES = "NVIDIA H200", 132, 8

# XLA's GpuTargetConfigProto; figures of the SXM card's data sheet and of compute capability 9.0.
TARGET = f"""
platform_name: "CUDA"
device_description_str: "{KIND}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  name: "{KIND}"
  model_str: "sm_9.0a"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  ecc_enabled: true
  core_count: {NUM_CORES}
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {141 * 2**30}
  memory_bandwidth: {4_800 * 10**9}
  l2_cache_size: {50 * 2**20}
  pcie_bandwidth: {32 * 2**30}
  device_address_bits: 64
  shared_memory_per_core: {228 * 2**10}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {227 * 2**10}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
}}
"""

OPTIONS = {"xla_gpu_autotune_level": 0}
"""Tuning would time candidates on a device."""


class CompilerMissing(RuntimeError):
    """The CUDA compiler is not installed; says what to install."""


def described_mesh(shape: MeshShape) -> Mesh:
    """A (stage, tensor) mesh over described devices, for one replica."""
    if shape.devices_per_replica > MAX_DEVICES:
        raise MeshError(
            f"mesh {shape} takes {shape.devices_per_replica} devices; a described host has "
            f"{MAX_DEVICES}"
        )
    devices = _devices(shape.devices_per_replica)
    return make_meshes(MeshShape(stage=shape.stage, tensor=shape.tensor), devices)[0]


def compile_described(jitted: Any, arguments: Any, shardings: Any) -> Compiled:
    """`jitted(*arguments)` compiled for the devices of `shardings`, a tree like `arguments`.

    `arguments` are shapes (`jax.ShapeDtypeStruct`); nothing is made or run.
    """
    placed = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        arguments,
        shardings,
    )
    mesh = jax.tree.leaves(shardings)[0].mesh
    # Pallas asks the mesh at hand which device it lowers for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.lower(*placed).compile(compiler_options=OPTIONS)


@functools.cache
def _devices(count: int) -> tuple[Any, ...]:
    try:
        host = topologies.get_topology_desc(
            KIND, "cuda", target_config=TARGET, topology=f"1x1x{count}"
        )
    except Exception as error:
        raise CompilerMissing(
            f"can't compile for a described {KIND}: {error}; install the compiler, "
            "pip install 'weft[aot]' (x86-64 Linux, about 400 MB)"
        ) from error
    return tuple(host.devices)
