"""`weft doctor`: what this machine offers, what is wrong with it, and what to do.

It does not load weights or compile.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import psutil

from model.checkpoint import CheckpointError
from model.families import UnsupportedModel, read_model_config
from model.kernel_choice import kernels_for
from model.partition import Partition
from serve.commands.devices import ensure_devices
from serve.config import ServeConfig, load_config
from sharding.mesh import MeshError, MeshShape, make_meshes

PACKAGES = (
    "weft",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "grpcio",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
LEAST_DRIVER = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}
"""The first driver branch of each CUDA major version."""


@dataclass(frozen=True)
class Problem:
    what: str
    remedy: str


@dataclass(frozen=True)
class Device:
    platform: str
    kind: str
    memory_bytes: int | None
    """What JAX may use; None where it does not say, as on a CPU."""


@dataclass(frozen=True)
class Machine:
    system: str
    python: str
    num_cores: int
    memory_bytes: int
    free_memory_bytes: int
    driver: str
    """NVIDIA's; empty where there is none."""
    versions: dict[str, str]
    devices: list[Device]
    kernels: dict[str, str]
    """What computes each operation that has kernels; with a configuration, as it says."""


def run(config: Path | None, overrides: Sequence[str], as_json: bool) -> bool:
    """Prints the machine and its problems; whether there are none. Raises ConfigError."""
    wanted = load_config(config, overrides) if config is not None else None
    if wanted is not None:
        ensure_devices(wanted.mesh)
    devices, problems = find_devices()
    kernels, unusable = find_kernels(devices, wanted)
    machine = examine(devices, kernels)
    problems += [*unusable, *diagnose(machine, os.environ)]
    if wanted is not None and devices:
        problems += check_mesh(wanted)
    if as_json:
        print(json.dumps(asdict(machine) | {"problems": [asdict(p) for p in problems]}, indent=2))
    else:
        print(describe(machine, wanted, problems))
    return not problems


def find_devices() -> tuple[list[Device], list[Problem]]:
    """JAX's devices, or why it has none."""
    try:
        found = jax.devices()
    except RuntimeError as error:
        remedy = (
            "unset JAX_PLATFORMS, or install the plugin it asks for: pip install 'weft[cuda13]'"
        )
        return [], [Problem(f"JAX finds no device: {error}", remedy)]
    return [
        Device(d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit"))
        for d in found
    ], []


def find_kernels(
    devices: Sequence[Device], config: ServeConfig | None
) -> tuple[dict[str, str], list[Problem]]:
    """By operation, the kernel on these devices, or why it is not to be had there."""
    if not devices:
        return {}, []
    try:
        asked = config.kernels.model_dump() if config is not None else {}
        return asdict(kernels_for(devices[0].platform, asked)), []
    except ValueError as error:
        what, _, remedy = str(error).partition("; ")
        return {}, [Problem(what, remedy)]


def examine(devices: list[Device], kernels: dict[str, str]) -> Machine:
    memory = psutil.virtual_memory()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        driver=_driver(),
        versions=dict(_versions()),
        devices=devices,
        kernels=kernels,
    )


def diagnose(machine: Machine, environment: Mapping[str, str]) -> list[Problem]:
    """What is wrong whatever is to be served."""
    versions = machine.versions
    plugins = [name for name in LEAST_DRIVER if name in versions]
    problems: list[Problem] = []

    def report(what: str, remedy: str) -> None:
        problems.append(Problem(what, remedy))

    for name in ("jaxlib", *plugins):
        if versions[name] != versions["jax"]:
            report(
                f"{name} is {versions[name]}, jax {versions['jax']}; they must be equal",
                f"pip install {name}=={versions['jax']}",
            )
    if len(plugins) > 1:
        report(f"{' and '.join(plugins)} are both installed", f"pip uninstall {plugins[0]}")
    on_gpu = any(device.platform == "gpu" for device in machine.devices)
    if machine.driver and not on_gpu:
        if environment.get("JAX_PLATFORMS", "") == "cpu":
            report("JAX_PLATFORMS=cpu hides the GPU", "unset JAX_PLATFORMS")
        elif not plugins:
            report("there is a GPU, and JAX has no plugin for it", "pip install 'weft[cuda13]'")
        else:
            report(
                "there is a GPU that JAX does not see",
                "look at nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
    for name in plugins:
        least = LEAST_DRIVER[name]
        if machine.driver and int(machine.driver.partition(".")[0]) < least:
            report(
                f"driver {machine.driver} is older than {name} needs, {least}",
                f"update the driver to {least} or later, or pip install 'weft[cuda12]' instead",
            )
    if re.search(r"xla_gpu_enable_command_buffer=(\s|$)", environment.get("XLA_FLAGS", "")):
        report(
            "XLA_FLAGS turns CUDA graphs off: xla_gpu_enable_command_buffer is empty",
            "remove it from XLA_FLAGS",
        )
    return problems


def check_mesh(config: ServeConfig) -> list[Problem]:
    """Whether the configured mesh fits these devices and, if it can be read, the model."""
    mesh = config.mesh
    shape = MeshShape(mesh.data, mesh.stage, mesh.tensor)
    problems: list[Problem] = []
    try:
        make_meshes(shape)
    except MeshError as error:
        problems.append(Problem(str(error), "give [mesh] fewer devices, or the machine more"))
    try:
        Partition(read_model_config(Path(config.model.path)), shape.stage, shape.tensor)
    except MeshError as error:
        problems.append(Problem(str(error), "set [mesh] to one of those"))
    except (UnsupportedModel, CheckpointError) as error:
        problems.append(Problem(str(error), "set model.path to a checkpoint that is served"))
    return problems


def describe(machine: Machine, config: ServeConfig | None, problems: Sequence[Problem]) -> str:
    kinds = [device.kind for device in machine.devices]
    memory = [d.memory_bytes for d in machine.devices if d.memory_bytes]
    each = f", {_gib(min(memory))} each" if memory else ""
    rows = {
        "system": f"{machine.system}, Python {machine.python}, {machine.num_cores} cores, "
        f"{_gib(machine.memory_bytes)} of memory, {_gib(machine.free_memory_bytes)} free",
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "driver": machine.driver or "none of NVIDIA's",
        "devices": ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) + each,
        "kernels": ", ".join(f"{name} {kernel}" for name, kernel in machine.kernels.items()),
    }
    if config is not None:
        mesh = config.mesh
        rows["mesh"] = f"{MeshShape(mesh.data, mesh.stage, mesh.tensor)} for {config.model.path}"
    lines = [f"{name:<10}{text}" for name, text in rows.items()]
    lines += [f"{'problem':<10}{p.what}\n{'':<10}to do: {p.remedy}" for p in problems]
    return "\n".join(lines if problems else [*lines, "no problem found"])


def _versions() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    """From the kernel, or from nvidia-smi where a container hides the kernel's file."""
    file = Path("/proc/driver/nvidia/version")
    if file.is_file() and (version := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())):
        return version[0]
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
