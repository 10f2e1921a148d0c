"""Experiments: a TOML file's matrices multiplied out to points.

It does not know what a kind measures (`plan/kinds`) or where figures go, and imports no JAX.
"""

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from plan.devices import Devices, parse_devices
from plan.hardware import hardware_names
from plan.kinds import KINDS, Kind
from plan.unknown import unknown


class ExperimentError(ValueError):
    """A file that is no experiment; says where, and what would be."""


@dataclass(frozen=True)
class Point:
    """One thing to measure."""

    kind: str
    settings: Kind

    @property
    def key(self) -> str:
        """Its kind and those settings that are not their default: what it is known by later."""
        said = [
            f"{field.name}={value}"
            for field in fields(self.settings)
            if (value := getattr(self.settings, field.name)) != field.default
        ]
        return " ".join([self.kind, *said])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "settings": asdict(self.settings)}


@dataclass(frozen=True)
class Experiment:
    name: str
    """The file's, without its ending."""
    title: str
    devices: Devices
    hardware: str | None
    """A file in configs/hardware; None: found by the devices' kind."""
    point_limit_s: float
    """How long one point may take, its process's start aside."""
    points: tuple[Point, ...]


DEFAULTS: Mapping[str, Any] = {"hardware": None, "point_limit_s": 300.0}
KEYS = ("title", "devices", *DEFAULTS, "matrix")


def find_experiments(path: Path) -> list[Path]:
    """The file itself, or the folder's TOML files by name."""
    files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files:
        raise ExperimentError(f"{path} has no .toml file; name an experiment or a folder of them")
    return files


def read_experiment(path: Path) -> Experiment:
    """Raises ExperimentError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExperimentError(f"{path}: {error}") from None
    try:
        return make_experiment(path.stem, values)
    except ValueError as error:
        raise ExperimentError(f"{path}: {error}") from None


def make_experiment(name: str, values: Mapping[str, Any]) -> Experiment:
    """The experiment in `values`, as read from TOML. Raises ValueError."""
    _check_known("", values, KEYS)
    values = {**DEFAULTS, **values}
    for key in KEYS:
        if key not in values:
            raise ValueError(f"{key} is missing; an experiment needs title, devices and [[matrix]]")
    if not isinstance(values["matrix"], list):
        raise ValueError("matrix is one table; write [[matrix]], of which there may be several")
    _check_type("title", values["title"], str)
    _check_type("devices", values["devices"], str)
    devices = parse_devices(values["devices"])
    hardware = values["hardware"]
    if hardware is not None and hardware not in hardware_names():
        raise ValueError(unknown("hardware", hardware, hardware_names()))
    limit_s = values["point_limit_s"]
    if not isinstance(limit_s, int | float) or isinstance(limit_s, bool) or limit_s <= 0:
        raise ValueError(f"point_limit_s is {limit_s!r}; it must be seconds, above 0")
    points: list[Point] = []
    for place, matrix in enumerate(values["matrix"], 1):
        try:
            if not isinstance(matrix, dict):
                raise ValueError(f"it is {matrix!r}; it must be a table")
            points += _multiply(matrix)
            _check_devices(points, devices)
        except ValueError as error:
            raise ValueError(f"matrix {place}: {error}") from None
    if not points:
        raise ValueError("it has no point; write a [[matrix]]")
    return Experiment(
        name=name,
        title=values["title"],
        devices=devices,
        hardware=hardware or (None if devices.platform == "gpu" else devices.platform),
        point_limit_s=float(limit_s),
        # Matrices may overlap, such as all meshes at one batch and all batches on one mesh.
        points=tuple({point.key: point for point in points}.values()),
    )


def make_point(kind: str, settings: Mapping[str, Any]) -> Point:
    """Raises ValueError for an unknown kind or key, a value of another type, or a senseless one."""
    _check_type("kind", kind, str)
    if kind not in KINDS:
        raise ValueError(unknown("kind", kind, list(KINDS)))
    type_ = KINDS[kind]
    declared = {field.name: field for field in fields(type_)}
    _check_known(f"{kind}.", settings, list(declared))
    hints = get_type_hints(type_)
    for name, field in declared.items():
        if name in settings:
            _check_type(name, settings[name], hints[name])
        elif field.default is MISSING:
            raise ValueError(f"{kind} needs {name}")
    return Point(kind, type_(**settings))


def _multiply(matrix: Mapping[str, Any]) -> Iterator[Point]:
    """Every combination of the values of keys that have several, the last key varying fastest."""
    choices = {
        name: values if isinstance(values, list) else [values] for name, values in matrix.items()
    }
    if "kind" not in choices:
        raise ValueError(f"kind is missing; there are {', '.join(KINDS)}")
    for name, values in choices.items():
        if not values:
            raise ValueError(f"{name} is an empty list; give a value or more")
    for combination in itertools.product(*choices.values()):
        settings = dict(zip(choices, combination, strict=True))
        yield make_point(settings.pop("kind"), settings)


def _check_devices(points: Sequence[Point], devices: Devices) -> None:
    for point in points:
        if devices.count is not None and point.settings.num_devices > devices.count:
            raise ValueError(
                f"{point.key} takes {point.settings.num_devices} devices, {devices} has "
                f"{devices.count}; leave it out or raise devices"
            )


def _check_known(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(unknown("key", f"{where}{key}", [f"{where}{name}" for name in known]))


def _check_type(name: str, value: object, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(unknown(name, str(value), get_args(hint)))
    elif type(value) is not hint and not (hint is float and type(value) is int):
        raise ValueError(f"{name} is {value!r}; it must be of type {hint.__name__}")
