"""Memory that devices take as it is, and a budget for what is on its way."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest

from model.host_memory import Budget, aligned_as, aligned_empty


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("shape", [(), (0, 5), (3, 7), (1000, 333)])
def test_aligned_memory_becomes_a_cpu_devices_own(shape, dtype):
    array = aligned_empty(shape, np.dtype(dtype))
    array[...] = 1
    held = jax.device_put(array, jax.devices("cpu")[0])
    assert held.shape == shape
    assert held.dtype == dtype
    if array.size:
        assert held.unsafe_buffer_pointer() == array.ctypes.data


def test_what_has_the_dtype_is_not_copied():
    array = np.ones((3, 4), np.float32)
    assert aligned_as(array, np.dtype(np.float32)) is array


def test_a_conversion_is_numpys_and_aligned():
    array = np.linspace(-3, 3, 21, dtype=np.float32).reshape(3, 7).T
    converted = aligned_as(array, np.dtype(ml_dtypes.bfloat16))
    assert converted.ctypes.data % 64 == 0
    assert converted.tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()


def test_no_more_bytes_are_used_than_the_budget_has():
    budget, used, peak = Budget(10), 0, 0
    counting = threading.Lock()

    def use(num_bytes: int) -> None:
        nonlocal used, peak
        with budget.taken(num_bytes):
            with counting:
                used += num_bytes
                peak = max(peak, used)
            time.sleep(0.001)
            with counting:
                used -= num_bytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [1, 5, 10, 3, 3, 3, 7] * 10))
    assert 5 < peak <= 10


def test_who_wants_much_is_not_passed_by_those_who_want_little():
    budget, order = Budget(10), []
    asked = threading.Semaphore(0)

    def use(num_bytes: int) -> None:
        asked.release()
        with budget.taken(num_bytes):
            order.append(num_bytes)

    with ThreadPoolExecutor(3) as pool, budget.taken(5):
        for num_bytes in (10, 1, 2):
            pool.submit(use, num_bytes)
            asked.acquire()
            time.sleep(0.05)  # so that it waits before the next one asks
        assert order == [], "5 bytes are free, but it isn't the turn of 1 and 2"
    assert order[0] == 10


def test_bytes_are_free_again_after_an_error():
    budget = Budget(4)
    with pytest.raises(KeyError), budget.taken(4):
        raise KeyError
    with budget.taken(4):
        pass
