"""Another engine on the same machine, with a model of the same shape and requests of the same size.

It runs in a process of its own, of this machine's Python; it is measured by `plan/peers.py`. One
that is not there, or can't do it, is not measured, with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from plan.devices import Devices
from plan.kinds.kind import Contest, Outcome
from plan.models import load_model


@dataclass(frozen=True)
class Peer:
    engine: Literal["transformers-compiled", "transformers-paged"]
    """`generate` with a static cache and torch.compile; or its paged continuous batching."""
    model: str
    """A file in configs/models."""
    concurrency: int
    """Requests, all at once."""
    prompt: int = 1000
    """Tokens of each request."""
    output: int = 1000
    """Tokens of each answer."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    limit_s: float = 150.0
    """What it may take in all."""

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Peers": ("output_tokens_per_s", "decode_tokens_per_s", "ttft_s", "total_s", "start_s")
    }
    contest: ClassVar[Contest | None] = None

    def __post_init__(self) -> None:
        load_model(self.model)
        for name in ("concurrency", "prompt", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.limit_s <= 0:
            raise ValueError(f"limit_s is {self.limit_s}; it must be seconds, above 0")

    @property
    def flags(self) -> str:
        return ""

    @property
    def num_devices(self) -> int:
        return 1

    def measure(self, devices: Devices, hardware: str | None) -> Outcome:
        from plan.peers import measure

        return measure(self, devices)
