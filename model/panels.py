"""Weights as products of few rows on a CPU read them fastest: 64 columns at a time.

XLA's products there take such panels of a weight one after the other. Where the weight lies row by
row, each row of a panel is in another page of memory. It does not know who multiplies
(`model/kernels/cpu_experts.py`).
"""

import math
from collections.abc import Sequence

import numpy as np

COLUMNS = 64

Shape = tuple[int, ...]


def panel_shape(shape: Shape) -> Shape | None:
    """Of a weight whose first axis a product sums over, as panels, [P, D, COLUMNS].

    None where its columns don't divide.
    """
    depth, width = shape[0], math.prod(shape[1:])
    return None if width % COLUMNS else (width // COLUMNS, depth, COLUMNS)


def to_panels(weight: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """`weight` as panels of `shape`."""
    panels, depth, columns = shape
    return weight.reshape(depth, panels, columns).swapaxes(0, 1)
