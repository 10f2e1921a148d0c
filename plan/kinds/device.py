"""What a device can do at all, measured: how fast it copies, and how fast it multiplies.

Other points' figures are told as fractions of these. It is measured by `plan/rates.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from plan.devices import Devices
from plan.kinds.kind import Contest, Outcome


@dataclass(frozen=True)
class Device:
    work: Literal["copy", "product"]
    """From memory to memory; or two square matrices."""
    dtype: Literal["float32", "bfloat16", "float8_e4m3fn", "int8"] = "bfloat16"
    size: int = 8192
    """Rows and columns of a matrix."""
    copy_bytes: int = 2**32
    """Of what is copied: many times what a cache holds."""
    in_flight: int = 8
    """Calls handed to the device before the first is waited for."""
    repeats: int = 10

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Rates": ("bytes_per_s", "flops_per_s", "call_s")
    }
    contest: ClassVar[Contest | None] = None

    def __post_init__(self) -> None:
        for name in ("size", "copy_bytes", "in_flight", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def flags(self) -> str:
        return ""

    @property
    def num_devices(self) -> int:
        return 1

    def measure(self, devices: Devices, hardware: str | None) -> Outcome:
        from plan.rates import measure

        return measure(self, devices)
