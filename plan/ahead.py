"""What several points need, or one needs later, made once: above all programs, compiled in threads.

It does not know what is made. It serves the process in which points are measured.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

from plan.devices import Devices

NUM_THREADS = 16
"""XLA releases the interpreter while it compiles; beyond, tracing keeps the interpreter busy."""


@runtime_checkable
class Prepares(Protocol):
    """A kind whose points' programs can be compiled before it is their turn."""

    def jobs(self, devices: Devices) -> Sequence[Callable[[], object]]:
        """Each makes something by `once`, which `measure` asks for again."""
        ...


def prepare(kinds: Sequence[object], devices: Devices, num_threads: int = NUM_THREADS) -> None:
    """Does the kinds' jobs, many at a time; what fails is told to whoever asks for it."""
    jobs = [job for kind in kinds if isinstance(kind, Prepares) for job in kind.jobs(devices)]
    with ThreadPoolExecutor(num_threads) as pool:
        wait([pool.submit(job) for job in jobs])


_made: dict[Hashable, Future[Any]] = {}
_lock = threading.Lock()


def once[T](key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returned or raised when `key` was asked for first; who comes meanwhile waits."""
    with _lock:
        is_first = key not in _made
        future = _made.setdefault(key, Future())
    if is_first:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)
    return future.result()


def take[T](key: Hashable, make: Callable[[], T]) -> T:
    """As `once`, for what is asked for once more at most: it is not kept any longer."""
    try:
        return once(key, make)
    finally:
        with _lock:
            _made.pop(key, None)
