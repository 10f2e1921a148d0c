"""What can be measured: each kind is a frozen dataclass, its fields the settings of a point.

A new kind is a module with such a class and a line in KINDS. Importing a kind imports no JAX: the
process that only reads experiments and writes reports knows them too.
"""

from plan.kinds.device import Device
from plan.kinds.kernel import Kernel
from plan.kinds.kind import Contest, Figures, Kind, Outcome
from plan.kinds.peer import Peer
from plan.kinds.serving import Serving
from plan.kinds.step import Step

__all__ = ["KINDS", "Contest", "Figures", "Kind", "Outcome"]

KINDS: dict[str, type[Kind]] = {
    "device": Device,
    "kernel": Kernel,
    "step": Step,
    "serving": Serving,
    "peer": Peer,
}
