"""What a kind of measurement must be. It knows none of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from plan.devices import Devices

Figures = Mapping[str, Any]
"""Raw figures by name, in the SI units that the name bears: `step_s`, `tokens_per_s`."""


@dataclass(frozen=True)
class Outcome:
    """What became of a point."""

    figures: Figures = field(default_factory=dict[str, Any])
    misfit: str = ""
    """Why it does not fit, with the bytes; empty when it does."""


@dataclass(frozen=True)
class Contest:
    """Which setting's values compete, all other settings being equal, and what decides."""

    setting: str
    empty: str
    """What its empty value is called."""
    aside: tuple[str, ...]
    """Settings that do not tell one case from another."""
    rate: str
    """The figure of which most wins."""
    rate_low: str
    """Its lower quartile; so is the next the upper."""
    rate_high: str
    unmeasured: tuple[str, ...]
    """Where nothing ran: figures of which least wins; each settles the ties of those before."""
    unmeasured_means: str
    """What that is, and leaves out."""
    reasons: tuple[str, ...]
    """Figures of which less may be why."""
    memory: tuple[str, ...]
    """Figures that add up to what a device must hold."""


class Kind(Protocol):
    """A frozen dataclass; `__post_init__` refuses settings that make no sense, by ValueError."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    tables: ClassVar[Mapping[str, tuple[str, ...]]]
    """The figures that a report shows, by what its tables are called."""
    contest: ClassVar[Contest | None]

    @property
    def flags(self) -> str:
        """XLA's, for the process that measures it."""
        ...

    @property
    def num_devices(self) -> int: ...

    def measure(self, devices: Devices, hardware: str | None) -> Outcome:
        """Called in a process that sees `devices`; imports JAX. `hardware` names their table."""
        ...
