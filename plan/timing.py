"""How long calls take: median and quartiles over repeats. It does not know what is called."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WARM_UP = 3
"""Calls before those that are timed: the first may allocate, load kernels or build graphs."""


@dataclass(frozen=True)
class Times:
    """Seconds: the median, and the quartiles on both sides of it."""

    median_s: float
    low_s: float
    high_s: float


def time_calls(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Of `repeats` calls after some that don't count; `call` waits until its work is done."""
    for _ in range(WARM_UP):
        call()
    taken: list[float] = []
    for _ in range(repeats):
        started = clock()
        call()
        taken.append(clock() - started)
    low_s, median_s, high_s = np.quantile(taken, [0.25, 0.5, 0.75]).tolist()
    return Times(median_s, low_s, high_s)
