"""How a point says which kernels it is measured with: one setting, a string.

It does not know what the kernels do, and imports no JAX.
"""

from collections.abc import Mapping
from dataclasses import fields

from model.kernel_choice import NAMES, Kernels
from plan.unknown import did_you_mean

OPERATIONS = tuple(field.name for field in fields(Kernels))


def asked_kernels(text: str) -> Mapping[str, str]:
    """By operation: "auto" asks for nothing, "xla" for all, "small_matmul=pallas" for one.

    Several operations have commas between them; what is not named is auto. Raises ValueError.
    """
    if text == "auto":
        return {}
    if text in NAMES:
        return dict.fromkeys(OPERATIONS, text)
    asked: dict[str, str] = {}
    for part in text.split(","):
        operation, _, name = part.partition("=")
        if operation not in OPERATIONS or name not in NAMES or operation in asked:
            hint = did_you_mean(operation, OPERATIONS)
            raise ValueError(
                f"kernels is {text!r}; {hint}it must be auto, one of {', '.join(NAMES)} for every "
                f"operation, or OPERATION=KERNEL,... with operations {', '.join(OPERATIONS)}, "
                "each once"
            )
        asked[operation] = name
    return asked
