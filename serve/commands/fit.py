"""`weft doctor --fit`: whether a configuration fits its devices, and what would make it fit.

The devices may be there or not: the largest steps are compiled for them, and never run. Of the
checkpoint only config.json is read.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

from model.checkpoint import hugging_face, manifest
from model.families import read_model_config
from model.step import StepShape
from plan.described import KIND, MAX_DEVICES, CompilerMissing, compile_described, described_mesh
from plan.hardware import Hardware, UnknownHardware, load_hardware
from serve.commands.devices import (
    MEMORY_FRACTION,
    MEMORY_VARIABLES,
    ensure_devices,
    keep_compiled_programs,
)
from serve.config import ConfigError, MeshSection, load_config
from serve.fit import Fit, Served, device_memory_bytes, fit, largest_shapes
from serve.programs import activation_bytes
from serve.progress import Progress
from serve.remedies import Remedy, remedies
from sharding.mesh import MeshError, MeshShape, make_meshes

CPU = "cpu"
"""The one file of configs/hardware that is not of a GPU."""


@dataclass(frozen=True)
class Target:
    """The devices here or, as many as it takes, those of `hardware`."""

    num_replicas: int
    hardware: Hardware | None = None
    described: bool = False
    """Compiled for, whether or not they are there."""

    @property
    def title(self) -> str:
        if self.hardware is None:
            return jax.devices()[0].device_kind
        taken = f", {_taken_share():.0%} of which JAX takes" if self.described else ""
        return f"{self.hardware.title} with {self.hardware.memory_bytes:,} bytes{taken}"

    @property
    def platform(self) -> str:
        return "gpu" if self.described else jax.devices()[0].platform

    @property
    def num_devices(self) -> int:
        """Those that a replica may take."""
        return MAX_DEVICES if self.described else len(jax.devices()) // self.num_replicas

    def memory_bytes(self, mesh: MeshSection) -> int:
        """What a program may use of one of them."""
        num_devices = mesh.data * mesh.stage * mesh.tensor
        if self.hardware is None:
            return device_memory_bytes(jax.devices()[0], num_devices)
        if self.described:
            return int(self.hardware.memory_bytes * _taken_share())
        return self.hardware.memory_bytes // num_devices

    def why_not(self, mesh: MeshSection) -> str:
        """Why nothing can be compiled for them; empty where it can."""
        try:
            if self.described:
                described_mesh(MeshShape(stage=mesh.stage, tensor=mesh.tensor))
        except (CompilerMissing, MeshError) as error:
            return str(error)
        return ""

    def activation_bytes(self, served: Served, num_pages: int) -> int:
        """What the largest steps need beside their arguments, by the compiler."""
        mesh = MeshShape(stage=served.partition.stages, tensor=served.partition.tensor)
        devices = described_mesh(mesh) if self.described else make_meshes(mesh)[0]
        programs = served.programs(num_pages, devices, served.kernels)

        def compile_step(shape: StepShape) -> int:
            step, arguments = programs.jit_step(shape), programs.abstract_arguments(shape)
            if not self.described:
                return activation_bytes(step.lower(*arguments).compile())
            cuts = programs.shardings(programs.argument_cuts())
            return activation_bytes(compile_described(step, arguments, cuts))

        shapes = largest_shapes(served)
        most = 0
        with (
            ThreadPoolExecutor(len(shapes)) as pool,
            Progress("compiling", len(shapes), "programs") as bar,
        ):
            for num_bytes in pool.map(compile_step, shapes):
                most = max(most, num_bytes)
                bar.advance()
        return most


def run(path: Path, overrides: Sequence[str], hardware: str | None, as_json: bool) -> bool:
    """Prints what fits, or what would; whether it does.

    Raises ConfigError, UnsupportedModel or MeshError.
    """
    config = load_config(path, overrides)
    model = read_model_config(Path(config.model.path))
    target = find_target(hardware, config.mesh)
    served = Served(config, model, target.platform)

    def check(changed: Served) -> Fit:
        mesh = changed.config.mesh
        found = fit(changed, target.memory_bytes(mesh))
        if found.short_bytes or target.why_not(mesh):
            return found
        return replace(found, activation_bytes=target.activation_bytes(changed, found.num_pages))

    found = check(served)
    fitting = remedies(served, found, check, target.num_devices) if found.short_bytes else []
    report = Report(served, target, found, fitting)
    print(report.to_json() if as_json else report.to_text())
    return not found.short_bytes


def find_target(hardware: str | None, mesh: MeshSection) -> Target:
    """Raises ConfigError where there is no such hardware."""
    try:
        found = None if hardware is None else load_hardware(hardware)
    except UnknownHardware as error:
        raise ConfigError(str(error)) from None
    if hardware is not None:
        # What is compiled for devices that are not there must not look for those that are.
        jax.config.update("jax_platforms", "cpu")
    described = hardware not in (None, CPU)
    if not described:
        ensure_devices(mesh)
        # A start with this configuration needs the same programs.
        keep_compiled_programs()
    return Target(mesh.data, found, described)


def _taken_share() -> float:
    """Of a GPU's memory, as `ensure_devices` has it. Raises ConfigError."""
    for name in MEMORY_VARIABLES:
        if told := os.environ.get(name):
            with suppress(ValueError):
                if 0 < float(told) <= 1:
                    return float(told)
            raise ConfigError(f"{name} is {told!r}; it must be a share of the memory, such as 0.95")
    return float(MEMORY_FRACTION)


@dataclass(frozen=True)
class Report:
    served: Served
    target: Target
    fit: Fit
    remedies: Sequence[Remedy]
    """Where it does not fit."""

    def to_json(self) -> str:
        config, found = self.served.config, self.fit
        report = {
            "model": config.model.path,
            "weights_are_there": self._weights_are_there,
            "mesh": config.mesh.model_dump(),
            "device": self.target.title,
            "fits": not found.short_bytes,
            "short_bytes": found.short_bytes,
            "free_bytes": found.free_bytes,
            "num_tokens": found.num_tokens,
            "fit": asdict(found),
            "remedies": [
                {"change": str(remedy.change), "fit": asdict(remedy.fit)}
                for remedy in self.remedies
            ],
        }
        return json.dumps(report, indent=2)

    def to_text(self) -> str:
        found, served = self.fit, self.served
        mesh = MeshShape(**served.config.mesh.model_dump())
        rows = (
            ("weights", found.weight_bytes, self._weights),
            ("state", found.state_bytes, f"slots, {served.limits.max_batch} and one for padding"),
            ("moving", found.moving_bytes, "pages on their way to and from tiers and engines"),
            ("activations", found.step_bytes, self._activations),
            (
                "pages",
                found.pool_bytes,
                f"{found.num_pages:,} of {found.page_size} tokens and one for padding, "
                f"{found.page_bytes:,} each",
            ),
            ("free", found.free_bytes, ""),
            ("memory", found.memory_bytes, f"{found.budget_bytes:,} of it to plan with"),
        )
        lines = [f"{served.config.model.path} on {mesh}, each {self.target.title}"]
        lines += [f"{name:<12}{num_bytes:>19,}  {what}".rstrip() for name, num_bytes, what in rows]
        return "\n".join([*lines, *self._verdict])

    @property
    def _weights(self) -> str:
        kind = self.served.model.quantization or self.served.dtype.name
        return kind if self._weights_are_there else f"{kind}, by config.json: they are not there"

    @property
    def _weights_are_there(self) -> bool:
        names = (manifest.NAME, hugging_face.SINGLE, hugging_face.INDEX)
        directory = Path(self.served.config.model.path)
        return any((directory / name).is_file() for name in names)

    @property
    def _activations(self) -> str:
        if self.fit.activation_bytes is None:
            why = self.target.why_not(self.served.config.mesh)
            return f"by estimate: {why}" if why else "by estimate, since it is too much anyhow"
        by = f"as compiled for an {KIND}" if self.target.described else "as compiled"
        return f"{by}; a start leaves {self.fit.reserved_bytes:,} free for them, by estimate"

    @property
    def _verdict(self) -> list[str]:
        if self.fit.short_bytes:
            to_do = [str(remedy) for remedy in self.remedies] or [
                "use more devices, or larger ones"
            ]
            return [
                f"does not fit: {self.fit.short_bytes:,} bytes too few on each device",
                *(f"{'to do':<12}{change}" for change in to_do),
            ]
        held, context = self.fit.num_tokens, self.served.limits.max_context
        verdict = f"fits, with keys and values of {held:,} tokens"
        if held < context:
            verdict += f"; longer requests are refused, though model.max_context is {context:,}"
        return [verdict]
