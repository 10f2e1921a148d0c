"""One step of a model on a mesh, as the server would run it: does it fit, what is in it, how fast.

The settings are here; it is built by `plan/steps.py` and measured by `plan/figures.py`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from plan.devices import Devices
from plan.kernel_choice import asked_kernels
from plan.kinds.kind import Contest, Outcome
from plan.models import load_model

Phase = Literal["decode", "loop", "prefill", "mixed"]

MESH = re.compile(r"(?:stage=[1-9]\d*|tensor=[1-9]\d*|stage=[1-9]\d*,tensor=[1-9]\d*)?")


@dataclass(frozen=True)
class Step:
    model: str
    """A file in configs/models."""
    mesh: str = ""
    """Such as stage=2,tensor=4; empty is one device. Replicas share nothing: there is no data."""
    phase: Phase = "decode"
    """One token of each row; a loop of `steps` tokens in one call; `prompt` tokens of each row;
    or one token of each row beside one prompt of `prompt` tokens."""
    batch: int = 1
    """Rows; in prefill, prompts."""
    context: int = 1024
    """Tokens of each row that are in its pages before the step."""
    prompt: int = 0
    """Prompt tokens that the step computes: of each row in prefill, of one more row in mixed."""
    steps: int = 8
    """Tokens of a loop."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and products; auto is the model's."""
    quantization: Literal["none", "int8", "fp8"] = "none"
    """Of the weights of products."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] = "auto"
    """Auto is that of the weights."""
    kernels: str = "auto"
    """Of every operation, or of some (`plan/kernel_choice.py`); auto is each's own."""
    page_size: int = 64
    chunk: int = 64
    """Prompt tokens of one prefill row."""
    max_context: int = 8192
    """Tokens that a row's page table has room for, as far as the model goes."""
    flags: str = ""
    """XLA's, such as --xla_gpu_enable_command_buffer=+WHILE."""
    in_flight: int = 1
    """Calls handed to the device before the first is waited for, as a server does: their time is
    then the device's, not that of their dispatch."""
    repeats: int = 20
    """Times that so many calls are timed; three go before."""

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Time": (
            "step_s",
            "tokens_per_s",
            "roofline_fraction",
            "floor_s",
            "idle_fraction",
            "compile_s",
        ),
        "Memory of one device": ("needed_bytes", "weight_bytes", "cache_bytes", "temp_bytes"),
        "What one device does in one step": (
            "num_kernels",
            "step_flops",
            "step_bytes",
            "collective_bytes",
            "collectives",
        ),
    }
    contest: ClassVar[Contest | None] = Contest(
        setting="mesh",
        empty="one device",
        aside=("in_flight", "repeats"),
        rate="tokens_per_s",
        rate_low="tokens_low_per_s",
        rate_high="tokens_high_per_s",
        unmeasured=("ring_floor_s", "collective_bytes"),
        unmeasured_means=(
            "the time in which a device could move and multiply what it must, ticks of the ring in "
            "which it waits included, what devices say to each other left out"
        ),
        reasons=(
            "least_bytes",
            "least_flops",
            "idle_fraction",
            "num_kernels",
            "num_collectives",
            "collective_bytes",
        ),
        memory=("weight_bytes", "cache_bytes", "temp_bytes"),
    )

    def __post_init__(self) -> None:
        model = load_model(self.model)
        if not MESH.fullmatch(self.mesh):
            raise ValueError(
                f"mesh is {self.mesh!r}; it must be stage=N, tensor=N, stage=N,tensor=N, or empty"
            )
        asked_kernels(self.kernels)
        for name in ("batch", "steps", "page_size", "chunk", "in_flight", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        has_prompt = self.phase in ("prefill", "mixed")
        if has_prompt != (self.prompt > 0):
            needed = "1 or more" if has_prompt else "0, or the phase prefill or mixed"
            raise ValueError(
                f"prompt is {self.prompt} with phase {self.phase}; it must be {needed}"
            )
        least = 0 if self.phase == "prefill" else 1
        most = min(self.max_context, model.max_context) - self.longest_new
        if not least <= self.context <= most:
            raise ValueError(
                f"context is {self.context}; beside {self.longest_new} new tokens it must be "
                f"{least} to {most}, of {model.max_context} of {self.model} and max_context "
                f"{self.max_context}"
            )

    @property
    def num_devices(self) -> int:
        return math.prod(map(int, re.findall(r"\d+", self.mesh)))

    @property
    def tokens_per_call(self) -> int:
        """Tokens of a prompt or of output that one call advances, all rows together."""
        new = {"decode": self.batch, "loop": self.batch * self.steps}
        new |= {"prefill": self.batch * self.prompt, "mixed": self.batch + self.prompt}
        return new[self.phase]

    @property
    def steps_per_call(self) -> int:
        return self.steps if self.phase == "loop" else 1

    @property
    def longest_new(self) -> int:
        """New tokens of the row that gets most."""
        return {"decode": 1, "loop": self.steps}.get(self.phase, self.prompt)

    def jobs(self, devices: Devices) -> Sequence[Callable[[], object]]:
        from plan.figures import jobs

        return jobs(self, devices)

    def measure(self, devices: Devices, hardware: str | None) -> Outcome:
        from plan.figures import measure

        return measure(self, devices, hardware)
