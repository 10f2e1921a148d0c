"""Which kernel computes each operation of the step, by device, and which were asked in vain.

It imports no JAX: it is read by configuration, `weft doctor` and the metrics.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

log = logging.getLogger("weft")


@dataclass(frozen=True)
class Kernels:
    """For each operation the name of its kernel, one of NAMES."""

    decode_attention: str = "xla"
    """Rows of one query over their pages."""
    prefill_attention: str = "xla"
    """Rows of many queries over their pages, those just written included."""
    rotate_and_write: str = "xla"
    """Norm and rotation of queries and keys, and the write of keys and values."""
    small_matmul: str = "xla"
    """Products of few rows with weights, with the norm before and activation or residual after."""
    experts: str = "xla"
    """Experts over the tokens that were routed to them."""


NAMES = ("xla", "xla_8bit", "cpu", "pallas", "pallas_interpreted")
"""The reference in plain XLA; XLA with activations rounded to the weight's 8 bits, which costs
quality; XLA in a form that suits CPUs; our own kernels for GPUs; the same interpreted, slowly, on
any device. Of experts by cpu `Partition.suited` makes cpu_apart where each expert's weights can be
arrays of their own."""

XLA = Kernels()
CHOSEN = {
    "cpu": Kernels("cpu", "cpu", small_matmul="cpu", experts="cpu"),
    "gpu": Kernels("pallas", "pallas", "pallas", "xla", "pallas"),
}
"""By JAX's platform; docs/performance.md has what was measured on CPUs. On GPUs nothing is measured
yet: there XLA alone gathers keys and values to memory before it reads them, about three times the
traffic, and computes every expert for every token; but its products are tuned on the device."""

OPERATIONS_OF = {
    "cpu": ("decode_attention", "prefill_attention", "small_matmul", "experts"),
    "xla_8bit": ("small_matmul",),
}
"""Of the kernels that not every operation has."""


def kernels_for(platform: str, asked: Mapping[str, str] | None = None) -> Kernels:
    """The kernels for JAX's `platform`; `asked` says otherwise by operation, unless it says "auto".

    Raises ValueError where a kernel cannot run there.
    """
    wanted = {name: kernel for name, kernel in (asked or {}).items() if kernel != "auto"}
    kernels = replace(CHOSEN.get(platform, XLA), **wanted)
    for operation, kernel in asdict(kernels).items():
        if operation not in OPERATIONS_OF.get(kernel, (operation,)):
            raise ValueError(f"kernels.{operation} has no kernel {kernel}; set it to auto or xla")
        if kernel == "pallas" and platform != "gpu":
            raise ValueError(
                f"kernels.{operation} is pallas, which compiles for GPUs only, and the devices are "
                f"of platform {platform}; set it to auto, xla or pallas_interpreted"
            )
    return kernels


fallbacks: Counter[tuple[str, str, str]] = Counter()
"""Times a kernel could not take a shape and the reference did: by operation, kernel and reason.
Counted when a program is traced, not when it runs."""
_counting = threading.Lock()


def note_fallback(operation: str, kernel: str, reason: str) -> None:
    """Counts it, and says so the first time; several threads may trace at once."""
    with _counting:
        fallbacks[operation, kernel, reason] += 1
        is_first = fallbacks[operation, kernel, reason] == 1
    if is_first:
        log.warning("%s: %s does not cover %s; xla computes it", operation, kernel, reason)
