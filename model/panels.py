"""Weights as products of few rows on a CPU read them fastest: 64 columns at a time.

XLA's products there take such panels of a weight one after the other. Where the weight lies row by
row, each row of a panel is in another page of memory, and a product takes up to twice as long. It
does not know who multiplies (`model/kernels/cpu_matmul.py`, `cpu_experts.py`).
"""

import math
from collections.abc import Sequence

import numpy as np

COLUMNS = 64

Shape = tuple[int, ...]


def panel_shape(shape: Shape, num_summed: int) -> Shape | None:
    """Of a weight whose first `num_summed` axes a product sums over, as panels, [P, D, COLUMNS].

    None where its columns don't divide.
    """
    depth, width = math.prod(shape[:num_summed]), math.prod(shape[num_summed:])
    return None if width % COLUMNS else (width // COLUMNS, depth, COLUMNS)


def to_panels(weight: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """`weight` as panels of `shape`."""
    panels, depth, columns = shape
    return weight.reshape(depth, panels, columns).swapaxes(0, 1)
