"""What a compiled step costs, and a file of the most that each may: configs/budgets/NAME.toml.

It does not know how the costs are found (`tools/gpu_check.py`).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from plan.unknown import unknown

Traffic = dict[str, tuple[int, int]]
"""By kind of collective, how often it runs and the bytes that one device puts in."""

Case = tuple[str, str, str]
"""Model, mesh, step."""


class BudgetError(ValueError):
    """A budget file that can't be used; says where it is wrong."""


@dataclass(frozen=True)
class Cost:
    """Of one step on one device. What is not said to be a layer's is outside of layers."""

    layer_launches: int
    """Kernels, copies and library calls."""
    layer_loops: int
    """Loops of a length that only the device knows, and branches."""
    layer_collectives: Traffic
    launches: int
    loops: int
    collectives: Traffic
    copy_bytes: int
    """Of arrays written again as they are, of more than 64 KiB each."""
    slice_bytes: int
    """Of parts of arrays written out as they are, likewise."""
    sorts: int
    callbacks: int
    temp_bytes: int
    lost_bytes: int
    """Donated, but not taken over by an output."""


def exceeded(cost: Cost, budget: Cost) -> list[str]:
    """Each part of the budget that the cost is above, and by how much."""
    return [
        f"{part} is {found:,}, {found - allowed:,} above the budget of {allowed:,}"
        for part, found, allowed in _pairs(cost, budget)
        if found > allowed
    ]


def could_shrink(cost: Cost, budget: Cost) -> bool:
    """Whether the budget allows more than is needed."""
    return any(found < allowed for _, found, allowed in _pairs(cost, budget))


def _pairs(cost: Cost, budget: Cost) -> list[tuple[str, int, int]]:
    pairs: list[tuple[str, int, int]] = []
    for part in fields(Cost):
        found, allowed = getattr(cost, part.name), getattr(budget, part.name)
        if not isinstance(found, dict):
            pairs.append((part.name, found, allowed))
            continue
        for kind in sorted({*found, *allowed}):
            both = zip(found.get(kind, (0, 0)), allowed.get(kind, (0, 0)), strict=True)
            names = ("runs", "bytes")
            pairs += [
                (f"{part.name}.{kind} {name}", *pair)
                for name, pair in zip(names, both, strict=True)
            ]
    return pairs


def read_budgets(path: Path) -> dict[Case, Cost]:
    """The budgets of a file, none if it isn't there."""
    if not path.is_file():
        return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise BudgetError(f"{path}: {error}") from error
    return {
        (model, mesh, step): _read_cost(f"{path}: {model}, {mesh}, {step}", values)
        for model, meshes in tables.items()
        for mesh, steps in _table(f"{path}: {model}", meshes).items()
        for step, values in _table(f"{path}: {model}, {mesh}", steps).items()
    }


def write_budgets(path: Path, budgets: Mapping[Case, Cost]) -> None:
    """Rewrites the file but for the comment that it opens with."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    blocks = ["\n".join(lines[:end])] if end else []
    for (model, mesh, step), cost in budgets.items():
        head = f'["{model}"."{mesh}"."{step}"]'
        parts = [
            f"{part.name} = {_toml(getattr(cost, part.name))}"
            for part in fields(Cost)
            if getattr(cost, part.name) != {}
        ]
        blocks.append("\n".join([head, *parts]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _toml(value: int | Traffic) -> str:
    if isinstance(value, int):
        return f"{value:_}"
    inner = ", ".join(f"{kind} = [{runs:_}, {sent:_}]" for kind, (runs, sent) in value.items())
    return f"{{ {inner} }}"


def _read_cost(where: str, values: Any) -> Cost:
    values = _table(where, values)
    parts = {part.name: part.type for part in fields(Cost)}
    for key in values:
        if key not in parts:
            raise BudgetError(f"{where}: {unknown('key', key, parts)}")
    found: dict[str, Any] = {}
    for name, kind in parts.items():
        if kind is not int:
            traffic = _table(f"{where}, {name}", values.get(name, {}))
            found[name] = {key: _pair(f"{where}, {name}.{key}", v) for key, v in traffic.items()}
        elif name in values:
            found[name] = _count(f"{where}, {name}", values[name])
        else:
            raise BudgetError(f"{where} has no {name}")
    return Cost(**found)


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BudgetError(f"{where} is {value!r}; it must be a table")
    return value


def _pair(where: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise BudgetError(f"{where} is {value!r}; it must be [runs, bytes]")
    return _count(where, value[0]), _count(where, value[1])


def _count(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BudgetError(f"{where} is {value!r}; it must be a number of 0 or more")
    return value
