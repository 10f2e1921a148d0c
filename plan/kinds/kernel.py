"""One operation of `model/kernels` by one of its kernels: is it right on this device, how fast.

The settings are here; the operations are built by `plan/trials.py` and measured by
`plan/kernels.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from plan.devices import Devices
from plan.kinds.kind import Contest, Outcome
from plan.models import load_model

Operation = Literal[
    "decode_attention", "prefill_attention", "rotate_and_write", "small_matmul", "experts"
]

KernelName = Literal[
    "xla",
    "xla_8bit",
    "cpu",
    "pallas",
    "pallas_interpreted",
    "cudnn",
    "flashinfer",
    "flash_attention4",
]

TILING = re.compile(r"((queries|keys|splits|num_warps|num_stages)=[1-9]\d*(,|$))*")


@dataclass(frozen=True)
class Kernel:
    operation: Operation
    kernel: KernelName = "pallas"
    """The reference is xla's. Others' are yardsticks, which nothing serves with: cuDNN, prefill of
    whole prompts, not in pages; FlashInfer, attention of the shapes that `make comparators` builds;
    FlashAttention 4, prefill of such.
    """
    model: str = "llama-3.1-8b"
    """A file in configs/models, whose heads and widths these are."""
    head_dim: int = 0
    """Channels of a head; 0 is the model's."""
    rows: int = 1
    """Rows of one query; in prefill, prompts; in the other operations, tokens."""
    context: int = 1024
    """Tokens of each row that are in its pages before."""
    prompt: int = 0
    """Tokens of each prompt in prefill, computed in rows of `chunk`."""
    chunk: int = 512
    weight: Literal["", "qkv", "out", "gate_up", "down"] = ""
    """Which of a layer's products, with what stands around it there."""
    weight_dtype: Literal["auto", "int8", "float8_e4m3fn"] = "auto"
    """Of that product's weight, or the experts'; auto is `dtype`."""
    window: int = 0
    """Tokens that a query sees, itself included; 0: all."""
    softcap: float = 0.0
    sinks: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    cache_dtype: Literal["bfloat16", "float32", "float8_e4m3fn", "int8"] = "bfloat16"
    page_size: int = 64
    tiling: str = ""
    """How Pallas attention is cut where its default is not taken, such as keys=32,num_warps=8."""
    cold_bytes: int = 2**28
    """What the calls of a chain go over before they come back: many times what a cache holds."""
    repeats: int = 10

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Kernels": ("call_s", "bytes_per_s", "flops_per_s", "difference_fraction")
    }
    contest: ClassVar[Contest | None] = None

    def __post_init__(self) -> None:
        model = load_model(self.model)
        for name in ("rows", "chunk", "page_size", "cold_bytes", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if (self.operation == "prefill_attention") != (self.prompt > 0):
            raise ValueError(
                f"prompt is {self.prompt} with {self.operation}; it must be 1 or more in "
                "prefill_attention, and 0 elsewhere"
            )
        if (self.operation == "small_matmul") != bool(self.weight):
            raise ValueError(
                f"weight is {self.weight!r} with {self.operation}; small_matmul needs one of qkv, "
                "out, gate_up and down, and nothing else takes one"
            )
        if self.weight_dtype != "auto" and self.operation not in ("small_matmul", "experts"):
            raise ValueError(
                f"weight_dtype is {self.weight_dtype} with {self.operation}; only small_matmul and "
                "experts have weights"
            )
        if self.kernel == "xla_8bit" and self.operation != "small_matmul":
            raise ValueError(f"xla_8bit is for small_matmul, not {self.operation}; choose xla")
        if self.operation == "experts" and model.experts is None:
            raise ValueError(
                f"model is {self.model}, which has no experts; choose one that has, such as "
                "qwen3-30b-a3b"
            )
        if self.kernel == "cpu" and self.operation != "experts":
            raise ValueError(f"cpu is tried for experts, not {self.operation}; choose xla")
        if self.kernel == "cudnn" and not self._cudnn_can:
            raise ValueError(
                "cudnn is for prefill_attention with context 0, without window, softcap and "
                "sinks, over a cache of the same dtype; choose xla or pallas"
            )
        if self.kernel == "flashinfer" and "attention" not in self.operation:
            raise ValueError(
                f"flashinfer is for attention, not {self.operation}; choose xla or pallas"
            )
        if self.kernel == "flash_attention4" and self.operation != "prefill_attention":
            raise ValueError(
                f"flash_attention4 is for prefill_attention, not {self.operation}; choose xla or "
                "pallas"
            )
        if not TILING.fullmatch(self.tiling) or self.tiling.endswith(","):
            raise ValueError(
                f"tiling is {self.tiling!r}; it must be some of queries=N, keys=N, splits=N, "
                "num_warps=N and num_stages=N, with commas between"
            )
        if self.tiling and not ("attention" in self.operation and self.kernel.startswith("pallas")):
            raise ValueError(
                f"tiling is {self.tiling} with {self.operation} by {self.kernel}; only Pallas "
                "attention has one"
            )

    @property
    def flags(self) -> str:
        return ""

    @property
    def num_devices(self) -> int:
        return 1

    @property
    def _cudnn_can(self) -> bool:
        plain = not (self.context or self.window or self.softcap or self.sinks)
        same = self.dtype == self.cache_dtype
        return self.operation == "prefill_attention" and plain and same

    def jobs(self, devices: Devices) -> Sequence[Callable[[], object]]:
        from plan.kernels import jobs

        return jobs(self, devices)

    def measure(self, devices: Devices, hardware: str | None) -> Outcome:
        from plan.kernels import measure

        return measure(self, devices)
