"""Replicas along the mesh's `data` axis behind one engine's face.

Replicas share nothing, so each is an engine of its own and no step waits for another's. It does not
know other machines (that is the router's).
"""

import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from zlib import crc32

from cache.events import EventLog
from cache.tiers.counts import TierReport
from cache.tiers.record import RecordFormat
from cache.transfers.counts import TransferCounts
from cache.transfers.sending import Sending
from serve.engine import Engine, ModelInfo, Sink
from serve.errors import DuplicateRequest
from serve.pins import RetainedCounts
from serve.profile import Profile
from serve.request import GenerateRequest, Load, Output
from serve.telemetry import Series, add_up


class Replicas:
    """Sends each request to the replica with the fewest, of those that have not failed."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = list(engines)
        self._homes: dict[str, Engine] = {}
        self._lock = threading.Lock()
        first = engines[0].info
        self.info: ModelInfo = replace(
            first,
            mesh={**first.mesh, "data": len(engines)},
            num_pages=sum(engine.info.num_pages for engine in engines),
            max_batch=sum(engine.info.max_batch for engine in engines),
        )

    @property
    def page_form(self) -> RecordFormat | None:
        """Of the pages that they compute for others."""
        return self._engines[0].page_form

    def wake(self) -> None:
        """Something that a request waits for is there."""
        for engine in self._engines:
            engine.wake()

    @property
    def failure(self) -> BaseException | None:
        return next((e.failure for e in self._engines if e.failure is not None), None)

    def submit(self, request: GenerateRequest, sink: Sink, sending: Sending | None = None) -> None:
        def forget_when_done(output: Output) -> None:
            if output.finish_reason is not None:
                with self._lock:
                    self._homes.pop(output.request_id, None)
            sink(output)

        with self._lock:
            if request.request_id in self._homes:
                raise DuplicateRequest(
                    f"request {request.request_id!r} is being served; choose another request_id"
                )
            alive = [engine for engine in self._engines if engine.failure is None]
            home = min(alive or self._engines, key=_num_requests)
            if request.context and self.home(request.context) in alive:
                home = self.home(request.context)
            home.submit(request, forget_when_done, sending)
            self._homes[request.request_id] = home

    def home(self, context: str) -> Engine:
        """The replica that keeps the context of this name."""
        return self._engines[crc32(context.encode()) % len(self._engines)]

    def abort(self, request_id: str) -> None:
        with self._lock:
            home = self._homes.get(request_id)
        if home is not None:
            home.abort(request_id)

    def load(self) -> Load:
        """The sum over replicas."""
        loads = [engine.load() for engine in self._engines]
        draining = any(load.draining for load in loads)
        totals = {
            field.name: sum(getattr(load, field.name) for load in loads)
            for field in fields(Load)
            if field.name != "draining"
        }
        return Load(**totals, draining=draining)

    def series(self) -> list[Series]:
        return add_up([engine.series() for engine in self._engines])

    @property
    def profiles(self) -> list[Profile]:
        return [profile for engine in self._engines for profile in engine.profiles]

    def tiers(self) -> list[TierReport]:
        """Each replica's, one after the other."""
        return [report for engine in self._engines for report in engine.tiers()]

    @property
    def cache_events(self) -> EventLog:
        """Of all of them."""
        return self._engines[0].cache_events

    def retained(self) -> RetainedCounts:
        """The sum over replicas."""
        counts = [engine.retained() for engine in self._engines]
        return RetainedCounts(*map(sum, zip(*counts, strict=True)))

    def transfers(self) -> list[TransferCounts]:
        """Each replica's."""
        return [counts for engine in self._engines for counts in engine.transfers()]

    def flush_cache(self) -> int:
        return sum(engine.flush_cache() for engine in self._engines)

    def drain(self) -> None:
        for engine in self._engines:
            engine.drain()

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        return all(engine.wait_idle(timeout_s) for engine in self._engines)

    def start(self) -> None:
        for engine in self._engines:
            engine.start()

    def stop(self) -> None:
        for engine in self._engines:
            engine.stop()


def _num_requests(engine: Engine) -> int:
    load = engine.load()
    return load.num_running + load.num_waiting
