"""What a GPU report knows: a run's records, and what they say beside the rates of the same run.

It does not know how figures were taken, or how they are shown (`plan/gpu_tables.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from plan.drive import Run
from plan.experiment import Experiment
from plan.hardware import Hardware, StepWork, floor_s
from plan.kinds.serving import Serving
from plan.ledger import Record


@dataclass(frozen=True)
class Curve:
    """Decode of one model at one context, by batch."""

    label: str
    batches: Sequence[int]
    tokens_per_s: Sequence[float]
    floors_per_s: Sequence[float]
    """The most there could be at measured rates."""


@dataclass(frozen=True)
class Rates:
    """What the device reached when it did nothing else."""

    copy_bytes_per_s: float | None
    flops_per_s: Mapping[str, float]

    def of_bandwidth(self, num_bytes: float, seconds: float) -> float | None:
        return self.copy_bytes_per_s and num_bytes / seconds / self.copy_bytes_per_s

    def of_products(self, flops: float, seconds: float, dtype: str) -> float | None:
        rate = self.flops_per_s.get(dtype)
        return rate and flops / seconds / rate

    def floor_s(self, work: StepWork, dtype: str) -> float | None:
        """The least time of a step at these rates, as `plan/hardware.py` has it."""
        if not self.copy_bytes_per_s or dtype not in self.flops_per_s:
            return None
        measured = Hardware("as measured", 0, self.copy_bytes_per_s, self.flops_per_s)
        return floor_s(work, measured, dtype)


@dataclass(frozen=True)
class Results:
    experiment: Experiment
    run: Run
    problems: Sequence[str] = ()
    """What kept a part from being begun."""

    @property
    def records(self) -> Sequence[Record]:
        return self.run.records

    @property
    def device(self) -> str:
        return self.records[0].device if self.records else "no device"

    @property
    def commits(self) -> list[str]:
        return sorted({record.commit for record in self.records})

    @property
    def name(self) -> str:
        """Of the files: the device's, and the day of the first figure."""
        days = sorted(record.started[:10] for record in self.records)
        return f"{slug(self.device)}-{days[0] if days else 'nothing'}"

    @property
    def is_complete(self) -> bool:
        done = all(record.settled or record.kind == "peer" for record in self.records)
        return done and not (self.faults or self.problems or self.run.missing)

    @property
    def faults(self) -> list[Record]:
        """Kernels that can't be used on this device."""
        return [record for record in self.records if "fault" in record.figures]

    @cached_property
    def rates(self) -> Rates:
        copies = [r for r in self.ok("device") if r.settings["work"] == "copy"]
        products = [r for r in self.ok("device") if r.settings["work"] == "product"]
        products.sort(key=lambda r: r.figures["flops_per_s"])  # of a dtype's, the last is kept
        return Rates(
            max((r.figures["bytes_per_s"] for r in copies), default=None),
            {r.settings["dtype"]: r.figures["flops_per_s"] for r in products},
        )

    def find(self, kind: str, **settings: Any) -> list[Record]:
        """What was measured with these settings, and with no variant of weights, kernels, flags
        or pages that they don't name."""
        plain = {"kernels": "auto", "flags": "", "cache_dtype": "auto", "dtype": "auto"}
        plain |= {"quantization": "none", "max_steps": Serving.max_steps} | settings
        return [
            record
            for record in self.ok(kind)
            if all(record.settings.get(name, value) == value for name, value in plain.items())
        ]

    @cached_property
    def curves(self) -> list[Curve]:
        """Empty where rates or steps were not measured."""

        def case(record: Record) -> tuple[str, int]:
            return record.settings["model"], record.settings["context"]

        decoded = [r for r in self.find("step", phase="decode") if self.step_floor_s(r)]
        decoded.sort(key=lambda r: (*case(r), r.settings["batch"]))
        curves: list[Curve] = []
        for (model, context), some in groupby(decoded, key=case):
            group = list(some)
            batches = [record.settings["batch"] for record in group]
            floors = [self.step_floor_s(record) or 0.0 for record in group]
            curves.append(
                Curve(
                    f"{model}, context {context:,}",
                    batches,
                    [record.figures["tokens_per_s"] for record in group],
                    [batch / floor_s for batch, floor_s in zip(batches, floors, strict=True)],
                )
            )
        return curves

    def step_floor_s(self, record: Record) -> float | None:
        if "work" not in record.figures:
            return None
        return self.rates.floor_s(StepWork(**record.figures["work"]), "bfloat16")

    def ok(self, kind: str) -> list[Record]:
        """What came to an end, right or wrong."""
        return [r for r in self.records if r.kind == kind and r.status == "ok"]

    @cached_property
    def pairs(self) -> list[tuple[Record, Record]]:
        """Ours and a peer's, for the same requests all at once."""
        names = ("model", "concurrency", "prompt", "output")
        return [
            (ours, theirs)
            for theirs in self.ok("peer")
            for ours in self.find("serving", window_s=0.0, **{n: theirs.settings[n] for n in names})
        ]


def slug(device: str) -> str:
    """`1 NVIDIA H200 beside 16 cores ...` as h200, `8 virtual devices on ...` as cpu."""
    if "virtual" in device:
        return "cpu"
    name = device.partition(" beside ")[0]
    found = re.search(r"NVIDIA (\w+)", name)
    return (found[1] if found else re.sub(r"\W+", "-", name)).lower()
