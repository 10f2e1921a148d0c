"""The loop that serves one replica: schedule, submit, commit, forever.

It does not know text, the wire, or how a step is computed.
"""

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from cache.events import DEVICE, EventLog, OnChange
from cache.keys import Key
from cache.tiers.counts import TierReport
from cache.tiers.record import RecordFormat
from cache.transfers.counts import TransferCounts
from cache.transfers.sending import Sending
from serve.errors import DuplicateRequest, InvalidRequest, Unavailable
from serve.pins import RetainedCounts, RetainedPages, homes
from serve.profile import Phase, Profile
from serve.request import FinishReason, GenerateRequest, Load, Output
from serve.runner import Pending, Runner
from serve.scheduler import Scheduler
from serve.telemetry import RequestClock, RequestTimes, Series

log = logging.getLogger("weft")

Sink = Callable[[Output], None]

TIERS_GRACE_S = 10.0
"""For what the tiers have yet to write when the engine stops."""
FLUSH_S = 30.0
"""For what the tiers have yet to delete when the cache is flushed."""
MOST_STALLED_S = 1.0
"""Without a look: whoever brings a page says so, but might have died."""


class PrefillElsewhere(Protocol):
    """Other engines that compute prompts (`serve/prefill`), while this one runs."""

    def start(self, wake: Callable[[], None]) -> None:
        """`wake` is called when pages have arrived, from another thread."""
        ...

    def close(self) -> None: ...

    def flush(self) -> None:
        """Lets them forget what they have cached, as far as they belong to this one."""
        ...

    def counts(self) -> TransferCounts: ...


@dataclass(frozen=True, slots=True)
class _Client:
    """Who waits for a request's tokens."""

    sink: Sink
    request: RequestClock


@dataclass(frozen=True)
class ModelInfo:
    """What is served, and on what."""

    name: str
    architecture: str
    vocab_size: int
    max_context: int
    dtype: str
    mesh: Mapping[str, int]
    num_pages: int
    page_size: int
    max_batch: int
    eos_ids: tuple[int, ...]


class Engine:
    """A scheduler, a runner, and the thread that moves them. Public methods are thread-safe."""

    def __init__(
        self,
        info: ModelInfo,
        scheduler: Scheduler,
        runner: Runner,
        seeds: random.Random,
        clock: Callable[[], float] = time.monotonic,
        cache_events: EventLog | None = None,
        replica: int = 0,
        prefill: PrefillElsewhere | None = None,
        page_form: RecordFormat | None = None,
    ) -> None:
        """`cache_events` is that of all replicas; without, the engine has its own. `prefill` is the
        scheduler's prefiller, which it starts and stops. With a `page_form`, that of pages on
        their way, it takes no requests but those of other engines."""
        self.info = info
        self.cache_events = cache_events or EventLog(uuid.uuid4().hex)
        self.cache_events.add(replica, DEVICE, self._follow_device, info.page_size)
        self.prefill, self.page_form = prefill, page_form
        self.failure: BaseException | None = None
        """Why the loop died; every request under way was given FinishReason.ERROR."""
        self._scheduler = scheduler
        self._runner = runner
        self._seeds = seeds
        self._clock = clock
        self._profile = Profile(clock)
        self._in_flight: Pending | None = None
        self._clients: dict[str, _Client] = {}
        self._request_times = RequestTimes()
        self._pins = homes(scheduler.prefixes)
        self._retained = RetainedPages(self._pins.retained, info.page_size)
        self._undelivered: list[Output] = []
        """What sinks have yet to be given, in the order in which it came about."""
        self._delivering = False
        self._changed = threading.Condition()
        """Guards the scheduler and all of these; never held while the device works."""
        self._preparing = threading.Lock()
        """Held, before `_changed`, from when a step is planned until the pages that it saves are
        being read: a flush comes before or after all of it."""
        self._draining = self._stopping = False
        self._is_stale = False
        """Something has happened since the last plan."""
        self._num_finished = self._num_generated = self._num_prompt = 0
        self._thread = threading.Thread(target=self._loop, name="weft-engine", daemon=True)

    def start(self) -> None:
        self._runner.start(self.wake)
        if self.prefill is not None:
            self.prefill.start(self.wake)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the step under way; requests still running are cancelled."""
        with self._changed:
            self._stopping = self._draining = self._is_stale = True
            for request_id in list(self._clients):
                self._cancel(request_id)
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if self.prefill is not None:
            self.prefill.close()
        self._runner.close(TIERS_GRACE_S)

    def submit(self, request: GenerateRequest, sink: Sink, sending: Sending | None = None) -> None:
        """Queues a request; `sink` gets each Output on the engine's thread, the last with a reason.
        `sending` is given its prompt's pages as they are computed.

        Raises InvalidRequest, DuplicateRequest, Overloaded or Unavailable; then sink is never
        called.
        """
        if self.page_form is not None and sending is None:
            raise Unavailable(
                "this engine computes prompts for others (split.role is prefill); send the request "
                "to one that decodes"
            )
        vocab = self.info.vocab_size
        wrong = [i for i in request.prompt_ids if not 0 <= i < vocab]
        if wrong:
            raise InvalidRequest(
                f"prompt token id {wrong[0]} is outside the vocabulary: 0 to {vocab - 1}"
            )
        names = self._scheduler.names_of(request)
        if request.keep is not None and names is None:
            raise InvalidRequest(
                "this server caches no prefixes, so it can keep none; send the request without "
                "keep, or set cache.prefix_caching = true"
            )
        with self._changed:
            if self.failure is not None:
                raise Unavailable(f"the engine has failed: {self.failure}")
            if self._draining:
                raise Unavailable("the server is draining; send the request to another replica")
            # It may have ended in the scheduler; its client has yet to be told so.
            if request.request_id in self._clients:
                raise DuplicateRequest(
                    f"request {request.request_id!r} is being served; choose another request_id"
                )
            now_s = self._clock()
            self._scheduler.add(request, self._seeds.getrandbits(63), now_s, names, sending)
            if names is not None:
                self._retained.submitted(names, request.keep, now_s)
            self._clients[request.request_id] = _Client(sink, RequestClock(now_s))
            self._is_stale = True
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """Ends a request; its pages and slot are free at once. Unknown ids are ignored."""
        with self._changed:
            self._cancel(request_id)
            self._is_stale = True
            self._changed.notify_all()

    def tiers(self) -> list[TierReport]:
        """What lies below the devices."""
        return self._runner.tiers()

    def transfers(self) -> list[TransferCounts]:
        """What came of prompts that other engines may compute; none where there are no others."""
        return [self.prefill.counts()] if self.prefill is not None else []

    def home(self, context: str) -> "Engine":
        """The replica that keeps the context of this name, and serves what is asked after it."""
        return self

    def pin(self, keys: Sequence[Key]) -> None:
        """Keeps a context's pages, there or yet to be computed (PinsExceedBudget)."""
        with self._changed:
            self._pins.contexts.pin(keys)
            self._is_stale = True
            self._changed.notify_all()

    def unpin(self, keys: Sequence[Key]) -> None:
        """Undoes one `pin` of these pages."""
        with self._changed:
            self._pins.contexts.unpin(keys)

    def retained(self) -> RetainedCounts:
        """What requests asked to be kept."""
        with self._changed:
            self._retained.expire(self._clock())
            return self._retained.counts

    def flush_cache(self) -> int:
        """Forgets all cached prefixes, the tiers' too; returns how many pages of the devices were
        kept for them alone."""
        prefixes = self._scheduler.prefixes
        # First who prefills for this one: else what they had might still come.
        if self.prefill is not None:
            self.prefill.flush()
        with self._preparing, self._changed:
            num_pages = prefixes.flush(self._scheduler.running)
            self._is_stale = True
            self._changed.notify_all()
        if prefixes.tiers is not None:
            prefixes.tiers.await_cleared(FLUSH_S)
        return num_pages

    def drain(self) -> None:
        """Refuses what comes and finishes what runs; returns at once."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Whether every request has ended and been told so, within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._clients and not self._delivering, timeout_s
            )

    def load(self) -> Load:
        pool = self._scheduler.tables.pool
        with self._changed:
            return Load(
                num_running=len(self._scheduler.running),
                num_waiting=self._scheduler.num_waiting,
                pages_used=pool.num_used,
                pages_total=pool.num_usable,
                max_batch=self._scheduler.limits.max_batch,
                max_queue=self._scheduler.limits.max_queue,
                num_preemptions=self._scheduler.num_preemptions,
                prefix_queries=self._scheduler.prefixes.num_asked,
                prefix_hits=self._scheduler.prefixes.num_found,
                num_finished=self._num_finished,
                generated_tokens=self._num_generated,
                prompt_tokens=self._num_prompt,
                compiles_after_warmup=self._runner.num_compiled_late,
                draining=self._draining,
            )

    def series(self) -> list[Series]:
        """Times of requests and of steps, to be exported."""
        return [*self._request_times.series(), *self._profile.series()]

    @property
    def profiles(self) -> list[Profile]:
        """Where its steps' time goes: one, as there is one for each replica."""
        return [self._profile]

    def step(self) -> None:
        """One turn: the next step is on its way before the last one's tokens are read."""
        step = self._profile.begin()
        with self._preparing:
            with self._changed:
                with step.phase(Phase.SCHEDULE):
                    if self._retained:
                        self._retained.expire(self._clock())
                    plan = self._scheduler.schedule(self._clock())
                # Before anybody can abort a request: what it is to compute has names already.
                packed = self._runner.pack(plan, step)
                self._is_stale = False
            self._runner.prepare(plan, step)
        pending = self._runner.submit(packed, step) if packed else None
        last, self._in_flight = self._in_flight, pending
        if last:
            self._commit(last)
            return
        self._deliver()
        if not plan:
            self._wait_for_change()

    def wake(self) -> None:
        """Something that a request waits for is there. From any thread."""
        with self._changed:
            self._is_stale = True
            self._changed.notify_all()

    def _follow_device(self, on_change: OnChange) -> None:
        with self._changed:
            self._scheduler.tables.pool.index.follow(on_change)

    def _wait_for_change(self) -> None:
        """Nothing could be planned though there is work: pages are on their way from a tier."""
        with self._changed:
            if self._scheduler.has_work:
                self._changed.wait_for(lambda: self._is_stale, MOST_STALLED_S)

    def _commit(self, pending: Pending) -> None:
        """Takes in what a step chose, and gives it to those who wait for it."""
        step = pending.step
        with step.phase(Phase.DEVICE):
            pending.wait()
        with step.phase(Phase.COMMIT):
            results = pending.results()
            with self._changed:
                self._undelivered += self._scheduler.commit(pending.plan, results, self._clock())
        with step.phase(Phase.DELIVER):
            self._deliver()
        self._profile.finish(step)

    def _deliver(self) -> None:
        with self._changed:
            outputs, self._undelivered = self._undelivered, []
            now_s = self._clock()
            sinks = [self._sink(output, now_s) for output in outputs]
            self._delivering = bool(outputs)
        for sink, output in zip(sinks, outputs, strict=True):
            sink(output)
        if outputs:
            with self._changed:
                self._delivering = False
                self._changed.notify_all()

    def _sink(self, output: Output, now_s: float) -> Sink:
        """Who gets `output`, which is counted."""
        client = self._clients[output.request_id]
        if output.token_ids:
            self._num_generated += len(output.token_ids)
            self._request_times.given(client.request, len(output.token_ids), now_s)
        if output.finish_reason is not None:
            self._num_finished += 1
            self._num_prompt += output.usage.prompt_tokens if output.usage else 0
            if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._request_times.served(client.request, now_s)
            del self._clients[output.request_id]
        return client.sink

    def _cancel(self, request_id: str) -> None:
        if output := self._scheduler.abort(request_id, self._clock()):
            self._undelivered.append(output)

    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as error:
            log.exception("the engine's loop died")
            self._fail(error)

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do; False when the loop is to end."""
        with self._changed:
            if not self._has_work():
                self._profile.idle()
            self._changed.wait_for(lambda: self._stopping or self._has_work())
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._scheduler.has_work or self._in_flight or self._undelivered)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            for request_id in self._clients:
                # What failed may be the bookkeeping itself; clients are told all the same.
                with suppress(Exception):
                    self._scheduler.abort(request_id, self._clock())
            clients, self._clients = self._clients, {}
            self._delivering = True
        ended = Output(
            "", (), finish_reason=FinishReason.ERROR, error=f"the engine failed: {error}"
        )
        for request_id, client in clients.items():
            client.sink(replace(ended, request_id=request_id))
        with self._changed:
            self._delivering = False
            self._changed.notify_all()
