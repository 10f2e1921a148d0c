"""How a figure is shown, by the unit that its name bears. It knows no figure."""

from collections.abc import Mapping
from typing import Any

SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "flops": ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")),
}


def title(name: str) -> str:
    """`num_kernels` as kernels, `step_s` as step, `tokens_per_s` as tokens/s."""
    shown = name.removeprefix("num_").replace("_per_s", "/s").removesuffix("_s")
    return shown.removesuffix("_fraction").replace("_", " ")


def show(name: str, value: Any) -> str:
    """Three digits, and a unit where the name has one; None is what nobody measured or counted.

    Of collectives, by kind, how many there are and their bytes.
    """
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{_digits(found['runs'])} {kind} ({show('bytes', found['bytes'])})"
            for kind, found in value.items()
        )
    if name.endswith("_fraction"):
        return f"{value:.1%}"
    rate = "/s" if name.endswith("_per_s") else ""
    unit = name.removesuffix("_per_s").rpartition("_")[2]
    return _scaled(value, unit) + rate if unit in SCALES else _digits(value)


def _scaled(value: float, unit: str) -> str:
    scales = SCALES[unit]
    size, name = next((scale for scale in scales if abs(value) >= scale[0]), scales[-1])
    return f"{_digits(value / size)} {name}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
