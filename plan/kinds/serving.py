"""The whole engine, without text and without the wire: tokens per second, latencies, host gaps.

Either a batch of requests that come together and are timed until the last is answered, or a closed
loop: each that is answered is followed by another, and a window of time is measured. It is measured
by `plan/serving.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from plan.devices import Devices
from plan.kernel_choice import asked_kernels
from plan.kinds.kind import Contest, Outcome
from plan.models import load_model


@dataclass(frozen=True)
class Serving:
    model: str
    """A file in configs/models."""
    concurrency: int
    """Requests under way or waiting."""
    prompt: int = 1000
    """Tokens of each request."""
    output: int = 1000
    """Tokens of each answer."""
    window_s: float = 0.0
    """Of a closed loop; 0: a batch."""
    max_batch: int = 256
    token_budget: int = 2304
    chunk: int = 512
    max_steps: int = 8
    max_context: int = 2304
    page_size: int = 64
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8", "fp8"] = "none"
    """Of the weights of products."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] = "auto"
    kernels: str = "auto"
    flags: str = ""

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Rates": ("output_tokens_per_s", "decode_tokens_per_s", "window_s", "num_finished"),
        "Latencies": (
            "ttft_median_s",
            "ttft_p99_s",
            "between_tokens_median_s",
            "between_tokens_p99_s",
        ),
        "Where a step's time goes, medians": (
            "turn_s",
            "schedule_s",
            "pack_s",
            "dispatch_s",
            "device_s",
            "commit_s",
            "deliver_s",
            "host_gap_least_s",
            "host_gap_s",
            "host_gap_p90_s",
        ),
    }
    contest: ClassVar[Contest | None] = None

    def __post_init__(self) -> None:
        model = load_model(self.model)
        asked_kernels(self.kernels)
        counts = ("concurrency", "prompt", "output", "max_batch", "token_budget", "chunk")
        for name in (*counts, "max_steps", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.window_s < 0:
            raise ValueError(f"window_s is {self.window_s}; it must be seconds, or 0 for a batch")
        if self.token_budget <= self.max_batch:
            raise ValueError(
                f"token_budget is {self.token_budget}, max_batch {self.max_batch}: a full batch "
                "would leave no tokens for prompts; raise token_budget above max_batch"
            )
        most = min(self.max_context, model.max_context)
        if self.prompt + self.output > most:
            raise ValueError(
                f"prompt and output are {self.prompt + self.output} tokens; {self.model} and "
                f"max_context allow {most}"
            )

    @property
    def num_devices(self) -> int:
        return 1

    def jobs(self, devices: Devices) -> Sequence[Callable[[], object]]:
        from plan.serving import jobs

        return jobs(self, devices)

    def measure(self, devices: Devices, hardware: str | None) -> Outcome:
        from plan.serving import measure

        return measure(self, devices)
