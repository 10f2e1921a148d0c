"""A kernel's figures: how far it is from the reference on this device, then how long it takes.

It does not know the operations (`plan/trials.py`), nor which kernel should be chosen.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from plan.ahead import once
from plan.compiled import examine
from plan.described import compile_described, described_mesh
from plan.devices import Devices
from plan.kinds.kernel import Kernel
from plan.kinds.kind import Outcome
from plan.timing import WARM_UP, time_calls
from plan.trial import Trial
from plan.trials import trial
from sharding.mesh import MeshShape

MOST_S = 2.0
"""Timed calls stop here: a reference may take a hundred times what the kernel does."""


def jobs(kernel: Kernel, devices: Devices) -> Sequence[Callable[[], object]]:
    """Its programs, to be compiled ahead."""
    if devices.described or trial(kernel).uncovered():
        return []
    reference = _reference(kernel)
    programs = [(kernel, "one"), (kernel, "chain"), (reference, "one"), (reference, "make")]
    return [partial(_program, of, which, devices) for of, which in programs]


def measure(kernel: Kernel, devices: Devices) -> Outcome:
    """Where it can't be used, `fault` says why: wrong numbers, or what the compiler said."""
    tried = trial(kernel)
    if reason := tried.uncovered():
        return Outcome(misfit=f"{kernel.kernel} does not cover {reason}; xla computes it")
    try:
        one = _program(kernel, "one", devices)
        chain = _program(kernel, "chain", devices)
    except Exception as error:
        # Nothing has run: the device is as it was, and the process can go on.
        return Outcome({"fault": f"it does not compile: {str(error).partition('\n')[0]}"})
    if devices.described:
        return Outcome({"num_kernels": examine(one).num_launches})
    reference = _reference(kernel)
    arguments = _program(reference, "make", devices)()
    expected = _program(reference, "one", devices)(*arguments)
    difference = _difference(one(*arguments), expected)
    figures: dict[str, Any] = {"difference_fraction": difference}
    # A NaN is within no tolerance.
    if not difference <= tried.tolerance:
        figures["fault"] = (
            f"it is wrong: {difference:.3g} of the largest number away from the reference, "
            f"{tried.tolerance:g} allowed"
        )
    return Outcome(figures | _times(tried, partial(chain, *arguments)))


def _reference(kernel: Kernel) -> Kernel:
    return replace(kernel, kernel="xla", tiling="")


def _difference(found: Any, expected: Any) -> float:
    """The largest, of the largest number that is expected."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    away = jnp.stack([jnp.max(jnp.abs(a - b)) for a, b in pairs]).max()
    largest = jnp.stack([jnp.max(jnp.abs(b)) for _, b in pairs]).max()
    return float(away / largest)


def _times(tried: Trial, call: Callable[[], Any]) -> dict[str, Any]:
    def run() -> None:
        jax.block_until_ready(call())

    started = time.perf_counter()
    run()
    first_s = time.perf_counter() - started
    repeats = int(np.clip(MOST_S / first_s - WARM_UP, 1, tried.kernel.repeats))
    times = time_calls(run, repeats)
    call_s = times.median_s / tried.num_calls
    figures = {
        "call_s": call_s,
        "call_low_s": times.low_s / tried.num_calls,
        "call_high_s": times.high_s / tried.num_calls,
        "moved_bytes": tried.moved_bytes,
        "flops": tried.flops,
        "bytes_per_s": tried.moved_bytes / call_s,
    }
    return figures | ({"flops_per_s": tried.flops / call_s} if tried.flops else {})


def _program(kernel: Kernel, which: str, devices: Devices) -> Any:
    """`make`, `one` or `chain` of the kernel's trial, compiled once in a process."""
    kernel = replace(kernel, repeats=1)
    return once((kernel, which), partial(_compile, kernel, which, devices))


def _compile(kernel: Kernel, which: str, devices: Devices) -> Any:
    tried = trial(kernel)
    jitted = jax.jit(getattr(tried, which))
    arguments = () if which == "make" else jax.eval_shape(tried.make)
    if not devices.described:
        # Of an interpreted kernel LLVM makes thousands of lines, which are run a few times.
        options = {"xla_backend_optimization_level": 0} if tried.interpret else None
        return jitted.lower(*arguments).compile(options)
    everywhere = NamedSharding(described_mesh(MeshShape()), PartitionSpec())
    return compile_described(jitted, arguments, jax.tree.map(lambda _: everywhere, arguments))
