"""What hardware can do, from configs/hardware/NAME.toml, and the least time a step takes on it.

The floor counts what any program must move and multiply, each number once. It does not know the
programs we run (`plan/compiled.py`), what devices say to each other, and imports no JAX.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.weights import quantized, scale_shape, shapes
from plan.unknown import unknown

FOLDER = Path(__file__).parents[1] / "configs" / "hardware"

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}


class UnknownHardware(ValueError):
    """Hardware that has no file, or whose file can't be used; says what could be."""


class NoFloor(ValueError):
    """The least time of a step that can't be worked out; says why."""


@dataclass(frozen=True)
class Hardware:
    """One device."""

    title: str
    memory_bytes: int
    copy_bytes_per_s: float
    """Bytes read and bytes written together."""
    flops_per_s: Mapping[str, float]
    """By dtype, of matrix products."""

    def rate(self, dtype: str) -> float:
        if dtype not in self.flops_per_s:
            known = ", ".join(self.flops_per_s)
            raise NoFloor(f"{self.title} has no rate of {dtype} products, only {known}")
        return self.flops_per_s[dtype]


@dataclass(frozen=True)
class Precision:
    """The dtypes of one model as it runs."""

    weights: str = "bfloat16"
    cache: str = "bfloat16"
    products: str = "bfloat16"


@dataclass(frozen=True)
class RowWork:
    """`new` tokens of one sequence, after the `cached` that are in its pages already."""

    new: int
    cached: int


@dataclass(frozen=True)
class StepWork:
    """What one step must move and multiply on each device."""

    weight_bytes: int
    cache_bytes: int
    """Cached keys and values read, new ones written."""
    weight_flops: int
    """Products with weights."""
    attention_flops: int


def hardware_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_hardware(name: str) -> Hardware:
    """The device of configs/hardware/NAME.toml."""
    if name not in (names := hardware_names()):
        raise UnknownHardware(unknown("hardware", name, names))
    return read_hardware(FOLDER / f"{name}.toml")


def read_hardware(path: Path) -> Hardware:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UnknownHardware(f"{path}: {error}") from error
    _check_keys(path, "", values, [field.name for field in fields(Hardware)])
    rates = values["flops_per_s"]
    if not isinstance(rates, dict):
        raise UnknownHardware(f"{path}: flops_per_s is {rates!r}; it must be a table by dtype")
    _check_keys(path, "flops_per_s.", rates, list(ITEM_BYTES), all_needed=False)
    numbers = {key: values[key] for key in ("memory_bytes", "copy_bytes_per_s")} | rates
    for key, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise UnknownHardware(f"{path}: {key} is {value!r}; it must be a positive number")
    return Hardware(**values)


def step_work(
    model: ModelConfig,
    rows: Sequence[RowWork],
    precision: Precision | None = None,
    stages: int = 1,
    tensor: int = 1,
) -> StepWork:
    """What a step that advances `rows` must do on each of stages x tensor devices.

    With stages, rows are dealt to as many micro-batches, each of which reads the weights again.
    Raises NoFloor.
    """
    if model.experts:
        raise NoFloor(
            f"{model.architecture}: the floor of a model with experts is not worked out; "
            "which weights a step reads depends on where its tokens are sent"
        )
    precision = precision or Precision()
    fitted = replace(model, num_kv_heads=max(model.num_kv_heads, tensor))
    plain = replace(fitted, quantization=None)
    sizes = {name: math.prod(shape) for name, shape in shapes(plain).items()}
    head = sizes.get("head", sizes["embedding"])
    layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
    item_bytes = ITEM_BYTES[precision.weights]
    weight_bytes = (layers + head) * item_bytes
    if fitted.quantization:
        for name, shape in quantized(fitted).items():
            scale_bytes = ITEM_BYTES["float32"] * math.prod(scale_shape(name, shape))
            weight_bytes += scale_bytes - (item_bytes - 1) * sizes[name]
    tokens = sum(row.new for row in rows)
    devices = stages * tensor
    kv_heads = fitted.num_kv_heads // tensor
    token_bytes = kv_heads * (model.head_dim + model.value_dim) * ITEM_BYTES[precision.cache]
    attended = [_attended(row, layer.window) for layer in model.layers for row in rows]
    return StepWork(
        weight_bytes=weight_bytes // tensor,
        cache_bytes=sum(moved for moved, _ in attended) * token_bytes // stages,
        weight_flops=2 * (tokens * layers + len(rows) * head) // devices,
        attention_flops=sum(pairs for _, pairs in attended)
        * (2 * model.num_heads * (model.head_dim + model.value_dim))
        // devices,
    )


def floor_s(work: StepWork, hardware: Hardware, products: str = "bfloat16") -> float:
    """The least time of a step in seconds: weights, then attention, each as slow as its slower of
    memory and arithmetic. The two never overlap, since each layer's waits for the other. Raises
    NoFloor."""
    rate, bandwidth = hardware.rate(products), hardware.copy_bytes_per_s
    weights = max(work.weight_bytes / bandwidth, work.weight_flops / rate)
    return weights + max(work.cache_bytes / bandwidth, work.attention_flops / rate)


def _attended(row: RowWork, window: int | None) -> tuple[int, int]:
    """Tokens whose keys and values a row moves in one layer, and pairs of query and key."""
    window = window or row.cached + row.new
    seen = [min(row.cached + i + 1, window) for i in range(row.new)]
    return min(row.cached, window - 1) + row.new, sum(seen)


def _check_keys(
    path: Path, where: str, found: Mapping[str, Any], known: list[str], all_needed: bool = True
) -> None:
    for key in found:
        if key not in known:
            raise UnknownHardware(
                f"{path}: {unknown('key', f'{where}{key}', [f'{where}{name}' for name in known])}"
            )
    if all_needed and (missing := [key for key in known if key not in found]):
        raise UnknownHardware(f"{path} has no {where}{missing[0]}")
