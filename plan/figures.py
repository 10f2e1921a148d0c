"""A step's figures: whether it fits, what its program holds, how long it takes where it can run.

It does not know how the step was built (`plan/steps.py`) or who wants the figures.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import psutil
from jax.stages import Compiled

from plan.ahead import once, take
from plan.compiled import Kind, examine
from plan.described import compile_described
from plan.devices import Devices
from plan.fill import random_arrays, random_weights
from plan.hardware import (
    Hardware,
    NoFloor,
    Precision,
    floor_s,
    hardware_names,
    load_hardware,
    step_work,
)
from plan.kinds.kind import Outcome
from plan.kinds.step import Step
from plan.steps import BuiltStep, build
from plan.timing import time_calls
from sharding.mesh import MeshError


def jobs(step: Step, devices: Devices) -> Sequence[Callable[[], object]]:
    """Its program, to be compiled ahead."""

    def compile_ahead() -> object:
        return once(_program_key(step, devices), lambda: _compile(build(step, devices), devices))

    return [compile_ahead]


def measure(step: Step, devices: Devices, hardware: str | None) -> Outcome:
    """All that is found of a step; on devices that are described, nothing that takes time."""
    try:
        built = build(step, devices)
    except MeshError as error:
        return Outcome(misfit=str(error))
    sharing = built.programs.mesh.devices.size
    device = find_hardware(devices, hardware, sharing)
    memory_bytes = find_memory_bytes(devices, device, sharing)
    compiled, compile_s = take(_program_key(step, devices), partial(_compile, built, devices))
    figures: dict[str, Any] = {"compile_s": compile_s, "memory_bytes": memory_bytes}
    figures |= _contents(built, compiled)
    if device is not None:
        figures |= _least(built, device)
    if figures["needed_bytes"] > memory_bytes:
        return Outcome(figures, _misfit(figures))
    if not devices.described:
        figures |= _times(built, compiled)
        if "floor_s" in figures:
            figures["roofline_fraction"] = figures["floor_s"] / figures["step_s"]
    return Outcome(figures)


def find_hardware(devices: Devices, name: str | None, sharing: int = 1) -> Hardware | None:
    """One device's; the virtual devices that work, as many as `sharing`, share one processor.

    Without a name it is the one whose name is in the devices' own; None where there is no such.
    """
    if name is None:
        kind = jax.devices()[0].device_kind.lower()
        name = next((name for name in hardware_names() if name in kind), None)
    if name is None:
        return None
    whole = load_hardware(name)
    if devices.platform != "cpu":
        return whole
    return replace(
        whole,
        copy_bytes_per_s=whole.copy_bytes_per_s / sharing,
        flops_per_s={dtype: rate / sharing for dtype, rate in whole.flops_per_s.items()},
    )


def find_memory_bytes(devices: Devices, hardware: Hardware | None, sharing: int = 1) -> int:
    """What a program may use of a device: as it says itself, or for one that is not there, as the
    hardware's file says."""
    if devices.described:
        assert hardware is not None, "a description names its hardware"
        return hardware.memory_bytes
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"]
    return psutil.virtual_memory().total // sharing


def _program_key(step: Step, devices: Devices) -> tuple[Step, Devices]:
    """How a program is timed makes no difference to it."""
    return replace(step, in_flight=1, repeats=1), devices


def _compile(built: BuiltStep, devices: Devices) -> tuple[Compiled, float]:
    """The program, and what it took, if need be beside others."""
    started = time.perf_counter()
    jitted = built.programs.jit_step(built.shape)
    if devices.described:
        compiled = compile_described(jitted, built.arguments, built.shardings)
    else:
        compiled = jitted.lower(*built.arguments).compile()
    return compiled, time.perf_counter() - started


def _contents(built: BuiltStep, compiled: Compiled) -> dict[str, Any]:
    """What the program holds: bytes of one device, and what one device does in one step.

    In a loop over ticks XLA counts one tick, which is multiplied here. Loops of attention, whose
    length is data, stay one turn. Branches are left out: they are for what these rows don't ask,
    such as penalties and logprobs. What XLA does not count is None.
    """
    program, ticks, programs = examine(compiled), built.ticks_per_step, built.programs
    weights, _, _ = zip(built.arguments, built.shardings, strict=True)
    needed_bytes = program.argument_bytes + program.output_bytes + program.temp_bytes
    collectives: dict[str, dict[str, float]] = {}
    for operation in program.of(Kind.COLLECTIVE):
        if not operation.optional:
            found = collectives.setdefault(operation.what, {"runs": 0.0, "bytes": 0.0})
            found["runs"] += operation.runs * ticks
            found["bytes"] += operation.runs * operation.num_bytes * ticks
    return {
        "needed_bytes": needed_bytes - program.aliased_bytes,
        "weight_bytes": _device_bytes(*weights),
        "cache_bytes": programs.cache.num_pages * programs.cache.page_bytes(programs.partition),
        "temp_bytes": program.temp_bytes,
        "lost_donation_bytes": program.donated_bytes - program.aliased_bytes,
        "step_flops": None if program.flops is None else program.flops * ticks,
        "step_bytes": None if program.accessed_bytes is None else program.accessed_bytes * ticks,
        "num_kernels": program.num_launches * ticks,
        "collectives": collectives,
        "num_collectives": sum(found["runs"] for found in collectives.values()),
        "collective_bytes": sum(found["bytes"] for found in collectives.values()),
    }


def _least(built: BuiltStep, device: Hardware) -> dict[str, Any]:
    """What one step must do on each device at least, and the share of ticks it waits in.

    Where that is not known `no_floor` says why.
    """
    partition, dtype = built.programs.partition, built.programs.dtype.name
    precision = Precision(dtype, built.programs.cache.dtype.name, dtype)
    stages = partition.stages
    idle = {"idle_fraction": 1 - stages / built.ticks_per_step}
    try:
        work = step_work(partition.config, built.work, precision, stages, partition.tensor)
        least_s = floor_s(work, device, precision.products)
    except NoFloor as error:
        return idle | {"no_floor": str(error)}
    return idle | {
        "work": asdict(work),
        "least_bytes": work.weight_bytes + work.cache_bytes,
        "least_flops": work.weight_flops + work.attention_flops,
        "floor_s": least_s,
        "ring_floor_s": least_s * built.ticks_per_step / stages,
    }


def _times(built: BuiltStep, compiled: Compiled) -> dict[str, Any]:
    """Calls timed with the state that each leaves to the next."""
    programs, step = built.programs, built.step
    _, state_cuts, _ = programs.argument_cuts()
    weights, packed = random_weights(programs), built.packed()
    state = random_arrays(programs.abstract_state(), programs.shardings(state_cuts))

    def call() -> None:
        nonlocal state
        output = None
        for _ in range(step.in_flight):
            state, output = compiled(weights, state, packed)
        jax.block_until_ready((state, output))

    times = time_calls(call, step.repeats)
    tokens = step.tokens_per_call * step.in_flight
    steps = step.steps_per_call * step.in_flight
    return {
        "step_s": times.median_s / steps,
        "step_low_s": times.low_s / steps,
        "step_high_s": times.high_s / steps,
        "tokens_per_s": tokens / times.median_s,
        "tokens_low_per_s": tokens / times.high_s,
        "tokens_high_per_s": tokens / times.low_s,
    }


def _misfit(figures: dict[str, Any]) -> str:
    parts = {"weights": "weight_bytes", "pages": "cache_bytes", "temporaries": "temp_bytes"}
    of_which = ", ".join(f"{figures[figure]:,} of {name}" for name, figure in parts.items())
    return (
        f"it needs {figures['needed_bytes']:,} bytes a device ({of_which}), which has "
        f"{figures['memory_bytes']:,}; use more devices, fewer rows, or a shorter context"
    )


def _device_bytes(arrays: Any, shardings: Any) -> int:
    """Bytes of the arrays' parts on one device."""
    pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array, sharding in pairs
    )
