"""Work on another thread whose end is known even when who waits for it is cancelled."""

import asyncio
from collections.abc import Callable


async def to_its_end[T](work: Callable[[], T]) -> T:
    """What `work` returns, on another thread.

    A cancellation waits for its end, so that what it has done is known, and is raised by what is
    awaited next.
    """
    done = asyncio.get_running_loop().run_in_executor(None, work)
    is_cancelled = False
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled and (task := asyncio.current_task()):
        task.cancel()
    return done.result()
