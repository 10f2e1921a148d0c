"""How fast a device copies and multiplies, when it does nothing else.

It does not know what the rates are compared with.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from plan.devices import Devices
from plan.kinds.device import Device
from plan.kinds.kind import Outcome
from plan.timing import time_calls


def measure(device: Device, devices: Devices) -> Outcome:
    if devices.described:
        raise ValueError(f"rates are measured on devices that run, and {devices} is described")
    call, work = (_copy if device.work == "copy" else _product)(device)
    times = time_calls(call, device.repeats)
    unit = "bytes_per_s" if device.work == "copy" else "flops_per_s"
    done = work * device.in_flight
    return Outcome(
        {
            "call_s": times.median_s / device.in_flight,
            unit: done / times.median_s,
            unit.replace("_per_s", "_low_per_s"): done / times.high_s,
            unit.replace("_per_s", "_high_per_s"): done / times.low_s,
        }
    )


def _copy(device: Device) -> tuple[Callable[[], Any], int]:
    """Calls that write one array to another, and the bytes that one of them reads and writes."""
    shape = (device.copy_bytes // 4,)
    # Negated, since a plain copy might be none.
    copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
    source, target = _random(shape, "float32"), jnp.zeros(shape, jnp.float32)

    def call() -> None:
        nonlocal target
        for _ in range(device.in_flight):
            target = copy(source, target)
        target.block_until_ready()

    return call, 2 * source.nbytes


def _product(device: Device) -> tuple[Callable[[], Any], int]:
    """Calls that multiply two matrices, and the operations of one of them."""
    a, b = (_random((device.size, device.size), device.dtype, seed) for seed in range(2))
    whole = jnp.issubdtype(a.dtype, jnp.integer)
    # Results of 8-bit products are needed in more; others stay what they are.
    wider = jnp.int32 if whole else jnp.bfloat16
    out = wider if a.dtype.itemsize == 1 else a.dtype
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    multiply = jax.jit(
        partial(
            lax.dot_general,
            dimension_numbers=(((1,), (0,)), ((), ())),
            precision=exact,
            preferred_element_type=out,
        )
    )

    def call() -> None:
        jax.block_until_ready([multiply(a, b) for _ in range(device.in_flight)])

    return call, 2 * device.size**3


def _random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
    """Random, since what a GPU draws, and so its clock, depends on the bits."""

    def make() -> jax.Array:
        key = jax.random.key(seed, impl="rbg")
        if dtype == "int8":
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        wide = jnp.float32 if dtype == "float32" else jnp.bfloat16
        return jax.random.normal(key, shape, wide).astype(dtype)

    return jax.jit(make)()
