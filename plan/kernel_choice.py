"""How a point says which kernels it is measured with: one setting, a string.

It does not know what the kernels do, and imports no JAX.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields

from model.kernel_choice import NAMES, Kernels

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
            nearest = difflib.get_close_matches(operation, OPERATIONS, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest and nearest[0] != operation else ""
            raise ValueError(
                f"kernels is {text!r}; {hint}it must be auto, one of {', '.join(NAMES)} for every "
                f"operation, or OPERATION=KERNEL,... with operations {', '.join(OPERATIONS)}, "
                "each once"
            )
        asked[operation] = name
    return asked
