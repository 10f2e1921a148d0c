"""Carries outputs from the engine's thread to an event loop.

It does not know text or the wire.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain

from serve.errors import Overloaded
from serve.request import Output

MAX_BEHIND = 65_536
"""Tokens and reported alternatives kept for a reader slower than the engine: some megabytes."""


class Bridge:
    """Wakes its loop once for all outputs that come together, as those of an engine step do."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._posted: deque[tuple[Mailbox, Output]] = deque()
        self._woken = False

    def post(self, mailbox: "Mailbox", output: Output) -> None:
        """For the engine's thread."""
        # No lock: `_deliver` lowers the flag before it empties the queue, so whatever is appended
        # after that finds the flag down and wakes the loop again.
        self._posted.append((mailbox, output))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # The loop has closed, and its readers with it.
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._posted:
            mailbox, output = self._posted.popleft()
            mailbox.deliver(output)


class Mailbox:
    """One request's outputs on their way; only `put` may be called off the loop's thread.

    When the reader is more than MAX_BEHIND behind, what was kept is dropped and `abort` called.
    """

    def __init__(self, bridge: Bridge, abort: Callable[[], None]):
        self.ended = False
        """The engine has put the last output."""
        self._bridge = bridge
        self._abort = abort
        self._arrived = asyncio.Event()
        self._outputs: list[Output] = []
        self._num_kept = 0

    def put(self, output: Output) -> None:
        self.ended = output.finish_reason is not None
        self._bridge.post(self, output)

    def deliver(self, output: Output) -> None:
        if self._num_kept > MAX_BEHIND:
            return
        self._outputs.append(output)
        self._num_kept += len(output.token_ids)
        self._num_kept += sum(len(position.top_ids) for position in output.logprobs)
        if self._num_kept > MAX_BEHIND:
            self._outputs.clear()
            self._abort()
        self._arrived.set()

    async def take(self) -> Output:
        """All that has come since the last take as one output; waits while there is nothing.

        Raises Overloaded when the reader has fallen too far behind.
        """
        await self._arrived.wait()
        self._arrived.clear()
        if self._num_kept > MAX_BEHIND:
            raise Overloaded(
                f"the client is more than {MAX_BEHIND} tokens and alternatives behind the engine; "
                "read the stream faster, or ask for fewer max_tokens or logprobs"
            )
        outputs, self._outputs, self._num_kept = self._outputs, [], 0
        return join(outputs)


def join(outputs: Sequence[Output]) -> Output:
    """Successive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[-1],
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        logprobs=tuple(chain.from_iterable(output.logprobs for output in outputs)),
        prompt_logprobs=tuple(chain.from_iterable(output.prompt_logprobs for output in outputs)),
    )
