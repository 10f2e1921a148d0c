"""How long an engine takes to start, and on what: first with nothing kept, then again and again.

    weft bench start MODEL --set model.dtype=float32

Each start is a process of its own (`bench/start_worker.py`), with the weights' files dropped from
memory before it if the system lets go of them. Between starts plain reads of the same files say
what the disk gives under the same conditions: where the devices are CPUs, whose weights stay in the
host's memory, the reads keep what they read. It does not know how to start an engine.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from bench.disk import READERS, forget, read_apart_s, weight_files
from bench.report import Machine, this_machine
from bench.start_worker import LOAD, STAGES, Start
from model.families import read_model_config
from plan.machine import ROOT
from serve.config import ServeConfig, make_config, override_config
from serve.errors import RequestError


@dataclass(frozen=True)
class Report:
    """A first start, those after it, and what the disk gave in between."""

    model: str
    overrides: list[str]
    machine: Machine
    has_bytecode: bool
    """Whether imports find Python's bytecode, or compile sources each time."""
    first: Start
    later: list[Start]
    file_bytes: int
    is_cold: bool
    """Whether the files were read from the disk, not from memory."""
    disk_s: list[float]
    """Of plain reads of them, before each later start."""

    @property
    def keeps(self) -> bool:
        """Whether weights stay in the host's memory, and plain reads were to keep them likewise."""
        return self.first.platform == "cpu"

    @property
    def load_share(self) -> float:
        """The rate of loading, of the disk's."""
        return statistics.median(
            disk_s / start.seconds[LOAD]
            for disk_s, start in zip(self.disk_s, self.later, strict=True)
        )

    def to_json(self) -> str:
        figures = {
            "first_s": self.first.total_s,
            "second_s": statistics.median(start.total_s for start in self.later),
            "load_share": self.load_share,
        }
        return json.dumps(asdict(self) | {"figures": figures}, indent=2)

    def to_markdown(self) -> str:
        return f"{self._table()}\n\n{self._circumstances()}"

    def _table(self) -> str:
        rows = [("seconds", "first start", "second start"), ("---", "---:", "---:")]
        rows += [
            (
                stage,
                f"{self.first.seconds[stage]:.2f}",
                _spread([start.seconds[stage] for start in self.later]),
            )
            for stage in STAGES
        ]
        total = _spread([start.total_s for start in self.later])
        rows.append(("until the first token", f"{self.first.total_s:.2f}", total))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _circumstances(self) -> str:
        first, last = self.first, self.later[-1]
        load_s = statistics.median(start.seconds[LOAD] for start in self.later)
        machine = self.machine
        lines = [
            f"Second start: median of {len(self.later)} (lowest to highest).",
            f"Programs: {first.num_programs}; kept from an earlier start {first.num_kept} in the "
            f"first, {last.num_kept} in the second.",
            f"Weights: {self.file_bytes / 1e9:.3g} GB of files, {last.weight_bytes / 1e9:.3g} GB "
            f"on devices; read {'from the disk' if self.is_cold else 'from memory'} at "
            f"{self.file_bytes / load_s / 1e9:.2f} GB/s, {self.load_share:.0%} of the "
            f"{self.file_bytes / statistics.median(self.disk_s) / 1e9:.2f} GB/s of plain reads by "
            f"{READERS} threads{', which keep what they read' if self.keeps else ''}.",
            f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:.0f} GiB, Python "
            f"{machine.python}, load before {machine.load_before:.1f}; commit {machine.commit}"
            f"{' with changes' if machine.dirty else ''}; "
            f"{' '.join([self.model, *self.overrides])}.",
        ]
        if not self.has_bytecode:
            lines.append(
                "Packages have no bytecode here, so each import compiles its source: "
                f"`{sys.executable} -m compileall -q {Path(jax.__file__).parents[1]}` ends that."
            )
        return "\n".join(f"- {line}" for line in lines)


def run(model: Path, overrides: Sequence[str] = (), repeats: int = 3) -> Report:
    """Start `model`, served with `overrides`, once with nothing kept and then `repeats` times.

    Progress goes to stderr. Raises RequestError where a start fails, and what reading the model's
    configuration raises.
    """
    asked = make_config({"model": {"path": str(model.absolute())}}, "weft bench start")
    config = override_config(asked, overrides)
    directory = Path(config.model.path)
    read_model_config(directory)
    files = weight_files(directory)
    machine = this_machine(ROOT)
    later: list[Start] = []
    disk_s: list[float] = []
    with tempfile.TemporaryDirectory(prefix="weft-start-") as kept:
        is_cold = forget(files)
        first = _start(config, kept)
        for _ in range(repeats):
            is_cold &= forget(files)
            disk_s.append(read_apart_s(directory, keep=first.platform == "cpu"))
            is_cold &= forget(files)
            later.append(_start(config, kept))
    return Report(
        model=str(model),
        overrides=list(overrides),
        machine=machine,
        has_bytecode=Path(importlib.util.cache_from_source(jax.__file__)).is_file(),
        first=first,
        later=later,
        file_bytes=sum(path.stat().st_size for path in files),
        is_cold=is_cold,
        disk_s=disk_s,
    )


def _start(config: ServeConfig, kept: str) -> Start:
    """One start, with the programs in the directory `kept`."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": kept}
    command = [sys.executable, "-m", "bench.start_worker", str(time.monotonic())]
    done = subprocess.run(
        command,
        input=config.model_dump_json(exclude_unset=True),
        stdout=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
        text=True,
    )
    if done.returncode:
        raise RequestError(f"a start ended with exit status {done.returncode}; see above why")
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
