"""A kind that does as it is told, and a worker that knows it: `python -m tests.plan.fake_kind`."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from plan import worker
from plan.devices import Devices
from plan.experiment import Experiment, make_experiment
from plan.kinds import KINDS, Contest, Outcome


@dataclass(frozen=True)
class Fake:
    do: str = "work"
    number: int = 0
    log: str = ""
    """A file that gets a line whenever a point is begun."""
    flags: str = ""

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"Numbers": ("number",)}
    contest: ClassVar[Contest | None] = None

    @property
    def num_devices(self) -> int:
        return 1

    def measure(self, devices: Devices, hardware: str | None) -> Outcome:
        if self.log:
            with Path(self.log).open("a") as log:
                log.write(f"{self.number} {os.getpid()} {os.environ['XLA_FLAGS']}\n")
        match self.do:
            case "work" | "work2":
                return Outcome({"number": self.number, "devices": f"{devices} {hardware}"})
            case "not fit":
                return Outcome({"needed_bytes": 3}, "it needs 3 bytes a device, which has 2")
            case "fail":
                raise KeyError("no such thing")
            case "run out":
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory: 5 bytes\nmore lines")
            case "print":
                os.system("echo a library greets")
                return Outcome({})
            case "die":
                os.write(2, b"a wire came loose\n")
                os._exit(3)
            case _:
                time.sleep(float(self.do))
                return Outcome({})


start = partial(worker.Worker, module="tests.plan.fake_kind")


def experiment(point_limit_s: float = 30, **settings: object) -> Experiment:
    """One matrix of fakes; KINDS must have them."""
    matrix = {"kind": "fake", **settings}
    values = {"title": "Fakes", "devices": "cpu:2", "point_limit_s": point_limit_s}
    return make_experiment("fakes", {**values, "matrix": [matrix]})


if __name__ == "__main__":
    KINDS["fake"] = Fake
    worker.name_device = lambda devices: f"fake {devices}"
    worker.main()
