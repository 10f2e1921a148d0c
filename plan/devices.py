"""Which devices an experiment is for, and what a process is told before JAX so that it sees them.

It imports no JAX.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

HOST_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")


@dataclass(frozen=True)
class Devices:
    """`cpu:8` is eight virtual CPU devices, `gpu` the GPUs there are, `h200:8` a described host.

    On described devices, programs are compiled and never run (`plan/described.py`).
    """

    platform: str
    """cpu, gpu, or the name of what is described."""
    count: int | None = None
    """None: as many as there are."""

    @property
    def described(self) -> bool:
        return self.platform not in ("cpu", "gpu")

    def __str__(self) -> str:
        return self.platform if self.count is None else f"{self.platform}:{self.count}"


def parse_devices(text: str) -> Devices:
    """Raises ValueError for what is none of `cpu:N`, `gpu` and `h200:N`."""
    match = re.fullmatch(r"gpu|(cpu|h200):([1-9]\d*)", text)
    if match is None:
        raise ValueError(
            f"devices is {text!r}; it must be cpu:N (virtual CPU devices), gpu (those there are) "
            "or h200:N (compiled for, not run), such as cpu:8"
        )
    return Devices(match[1], int(match[2])) if match[1] else Devices("gpu")


def environment(devices: Devices, flags: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited`, changed for a process that is to see `devices` with XLA's `flags` added."""
    own = inherited_flags(inherited)
    if devices.platform == "cpu":
        own += f" --xla_force_host_platform_device_count={devices.count}"
    changed = {**inherited, "XLA_FLAGS": f"{own} {flags}".strip()}
    # Programs kept from an earlier process would hide what compiling takes, unless that is asked.
    changed.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    if devices.platform != "gpu":
        changed["JAX_PLATFORMS"] = "cpu"
    return changed


def inherited_flags(inherited: Mapping[str, str]) -> str:
    """XLA's flags that were set before and stay; the number of host devices is ours to say."""
    return " ".join(HOST_DEVICES.sub("", inherited.get("XLA_FLAGS", "")).split())
