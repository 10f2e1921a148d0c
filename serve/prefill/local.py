"""Prompts computed on other devices of this process, whose pages move from mesh to mesh.

It does not know how an engine computes, or when a prompt is asked for.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cache.transfers.arrivals import Arrivals
from cache.transfers.counts import Outcome, TransferCounts
from cache.transfers.sending import Sending
from serve import plan
from serve.engine import Engine
from serve.errors import RequestError
from serve.prefill.asking import Tally, request_of
from serve.request import FinishReason, GenerateRequest, Output

log = logging.getLogger("weft")


class LocalPrefill:
    """An engine of its own mesh, which this starts and stops, for the replica that it sends to."""

    def __init__(self, engine: Engine, least_tokens: int, lease_s: float) -> None:
        """Prompts of which fewer than `least_tokens` are to be computed aren't worth the way; if
        nothing comes for `lease_s`, the replica computes them, too."""
        self.engine = engine
        self._least_tokens, self._lease_s = least_tokens, lease_s
        self._tally = Tally()
        self._wake: Callable[[], None] = lambda: None
        # The replica's thread asks under its lock, and must not wait for the engine's.
        self._errands = ThreadPoolExecutor(1, thread_name_prefix="weft-prefill")

    def start(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.engine.start()

    def close(self) -> None:
        self.engine.stop()
        self._errands.shutdown()

    def flush(self) -> None:
        self.engine.flush_cache()

    def counts(self) -> TransferCounts:
        return self._tally.counts()

    def prefill(self, sequence: plan.Sequence, first: int, last: int) -> Arrivals | None:
        size = self.engine.info.page_size
        if (last - first) * size < self._least_tokens:
            self._tally.ended(Outcome.SHORT)
            return None
        if self.engine.failure is not None:
            self._tally.ended(Outcome.NOBODY)
            return None
        assert sequence.names is not None, "only pages with names can come from elsewhere"
        request = request_of(sequence, last, size)
        transfer = _Transfer(self, request, first, last)
        arrivals = Arrivals(
            sequence.names.keys[first:last],
            self._wake,
            on_taken=lambda num: self.run(transfer.taken, num),
            on_over=lambda: self.run(transfer.cancel),
            lease_s=self._lease_s,
        )
        transfer.arrivals = arrivals
        self.run(transfer.submit)
        return arrivals

    def run(self, errand: Callable[..., None], *arguments: Any) -> None:
        """Soon, on another thread."""
        self._errands.submit(_logged, errand, *arguments)

    @property
    def tally(self) -> Tally:
        return self._tally


class _Transfer:
    """One prompt under way from one engine to the other."""

    arrivals: Arrivals

    def __init__(self, home: LocalPrefill, request: GenerateRequest, first: int, last: int) -> None:
        self._home, self._request = home, request
        self._sending = Sending(first, last, self._deliver, on_lost=self._lose)
        self._is_counted = False

    def submit(self) -> None:
        try:
            self._home.engine.submit(self._request, self._sink, self._sending)
        except RequestError as error:
            log.debug("a prompt is computed where it is decoded: %s", error)
            self._end(Outcome.FAILED)

    def taken(self, num_pages: int) -> None:
        self._sending.taken(num_pages)
        self._home.engine.wake()

    def cancel(self) -> None:
        self._sending.end()
        self._home.engine.abort(self._request.request_id)
        self._count(Outcome.CANCELLED)

    def _deliver(self, number: int, images: Sequence[Any]) -> None:
        self._home.tally.arrived(len(images), 0)
        self.arrivals.accept(images)
        if number + len(images) == self._sending.last:
            self._home.run(self._count, Outcome.COMPLETE)

    def _lose(self) -> None:
        self._home.run(self._end, Outcome.FAILED)

    def _sink(self, output: Output) -> None:
        if output.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
            self._home.run(self._end, Outcome.FAILED)

    def _end(self, outcome: Outcome) -> None:
        """Nothing more comes."""
        self._count(outcome)
        self.arrivals.end()

    def _count(self, outcome: Outcome) -> None:
        if not self._is_counted:
            self._is_counted = True
            self._home.tally.ended_as(self.arrivals, outcome)


def _logged(errand: Callable[..., None], *arguments: Any) -> None:
    try:
        errand(*arguments)
    except Exception:
        log.exception("a transfer of pages failed")
