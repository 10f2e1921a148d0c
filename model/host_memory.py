"""Memory of the host through which numbers pass on their way to devices.

It does not know what the numbers are or where they come from.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

ALIGNMENT = 64
"""Bytes: memory that begins at a multiple of it becomes a CPU device's own, without a copy."""


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def aligned_as(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`; itself if it is."""
    if array.dtype == dtype:
        return array
    converted = aligned_empty(array.shape, dtype)
    np.copyto(converted, array, casting="unsafe")
    return converted


class Budget:
    """Bytes that threads may use at once."""

    def __init__(self, num_bytes: int) -> None:
        self._free_bytes = num_bytes
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Waits until as many are free, and has them while the context lasts.

        Who asks first is served first, so that large wants are.
        """
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free_bytes >= num_bytes)
            self._free_bytes -= num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free_bytes += num_bytes
                self._changed.notify_all()
