"""An engine without a model: its tokens are known, and tests say when it steps.

`python -m tests.serve.fake_engine` serves one on a free port, which it prints, and steps once for
each line of its input.
"""

import asyncio
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cache.events import EventLog
from cache.tiers.counts import TierReport
from cache.transfers.counts import TransferCounts
from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
from serve.api.grpc_server import GrpcServer, Service, run_until_signalled
from serve.errors import DuplicateRequest, Overloaded, Unavailable
from serve.front import Front
from serve.pins import RetainedCounts
from serve.request import (
    FinishReason,
    GenerateRequest,
    Load,
    Output,
    Timings,
    TokenLogprobs,
    Usage,
)
from serve.telemetry import Histogram, Series

TIMEOUT_S = 60.0
"""Far beyond what any wait here takes; one that lasts as long is a failure."""


def alphabet(request: GenerateRequest, place: int) -> int:
    """The fake's answer to everything: abcdefghij..."""
    return ord("a") + place % 26


@dataclass(frozen=True)
class FakeInfo:
    name: str = "fake"
    architecture: str = "FakeForCausalLM"
    vocab_size: int = 256
    max_context: int = 4_096
    dtype: str = "float32"
    mesh: dict[str, int] = field(default_factory=lambda: {"data": 1, "stage": 1, "tensor": 1})
    num_pages: int = 64
    page_size: int = 16
    max_batch: int = 64
    eos_ids: tuple[int, ...] = (0,)


@dataclass
class _Running:
    request: GenerateRequest
    sink: Callable[[Output], None]
    num_tokens: int = 0
    aborted: bool = False


class FakeEngine:
    """Gives each running request `burst` tokens per step; a step takes a second of its clock."""

    def __init__(
        self,
        answer: Callable[[GenerateRequest, int], int] = alphabet,
        burst: int = 1,
        max_queue: int = 1_000,
        stepped: bool = False,
        info: FakeInfo | None = None,
    ):
        """`stepped`: it goes on only by `step`."""
        self.info = info or FakeInfo()
        self.failure: BaseException | None = None
        self.page_form = None
        self.submitted: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.waits = Histogram((0.5, 1.0))
        """Whatever a test puts there; so it is with the next."""
        self.reports: list[TierReport] = []
        self.transferred: list[TransferCounts] = []
        self.cache_events = EventLog("fake")
        """Of nobody's pages, unless a test adds some."""
        self._answer = answer
        self._burst = burst
        self._max_queue = max_queue
        self._limit = 0.0 if stepped else math.inf
        self._num_steps = 0
        self._num_told = 0
        self._num_finished = 0
        self._draining = False
        self._stopping = False
        self._requests: dict[str, _Running] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="fake engine")

    def __enter__(self) -> "FakeEngine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, request: GenerateRequest, sink: Callable[[Output], None]) -> None:
        with self._changed:
            if self.failure is not None or self._draining:
                raise Unavailable("the engine is draining; send the request to another replica")
            if request.request_id in self._requests:
                raise DuplicateRequest(f"request {request.request_id} is being served")
            if len(self._requests) >= self.info.max_batch + self._max_queue:
                raise Overloaded(f"the queue of {self._max_queue} is full; try again later")
            self.submitted.append(request)
            self._requests[request.request_id] = _Running(request, sink)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        with self._changed:
            if running := self._requests.get(request_id):
                self.aborted.append(request_id)
                running.aborted = True
                self._changed.notify_all()

    def load(self) -> Load:
        num_running = min(len(self._requests), self.info.max_batch)
        return Load(
            num_running=num_running,
            num_waiting=len(self._requests) - num_running,
            pages_used=num_running,
            pages_total=self.info.num_pages,
            max_batch=self.info.max_batch,
            max_queue=self._max_queue,
            num_preemptions=0,
            prefix_queries=0,
            prefix_hits=0,
            num_finished=self._num_finished,
            generated_tokens=0,
            prompt_tokens=0,
            compiles_after_warmup=0,
            draining=self._draining,
        )

    def series(self) -> list[Series]:
        return [Series("step_phase_seconds", self.waits, {"phase": "device"})]

    def tiers(self) -> list[TierReport]:
        return self.reports

    def transfers(self) -> list[TransferCounts]:
        return self.transferred

    def retained(self) -> RetainedCounts:
        return RetainedCounts(3, 4)

    def flush_cache(self) -> int:
        return 7

    def drain(self) -> None:
        self._draining = True

    def fail(self, error: BaseException) -> None:
        """Dies as an engine does whose step raises."""
        with self._changed:
            self.failure = error
            self._changed.notify_all()

    def allow(self, num_steps: float) -> None:
        """Lets the engine take as many steps more, when there is something to do."""
        with self._changed:
            self._limit += num_steps
            self._changed.notify_all()

    def step(self, num_steps: int = 1) -> None:
        """Returns when the steps have been taken and their tokens handed over."""
        self.allow(num_steps)
        self.wait_for(lambda: self._num_told == self._limit)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(happened, TIMEOUT_S), "it never happened"

    def wait_empty(self) -> None:
        """Waits until no request is held any more."""
        self.wait_for(lambda: not self._requests)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping:
                    return
                held = list(self._requests.values())
                can_step = self._num_steps < self._limit
            # Without the lock: whoever wants to submit or abort must not wait for a step.
            for sink, output in [*self._dropped(held), *(self._step() if can_step else [])]:
                sink(output)
            with self._changed:
                self._num_told = self._num_steps
                self._changed.notify_all()

    def _has_work(self) -> bool:
        requests = self._requests.values()
        can_step = bool(requests) and self._num_steps < self._limit
        has_dropped = any(r.aborted for r in requests) or (self.failure and requests)
        return self._stopping or can_step or bool(has_dropped)

    def _dropped(
        self, held: Sequence[_Running]
    ) -> Iterator[tuple[Callable[[Output], None], Output]]:
        for running in held:
            if self.failure is not None:
                yield self._end(running, (), FinishReason.ERROR, str(self.failure))
            elif running.aborted:
                yield self._end(running, (), FinishReason.CANCELLED)

    def _step(self) -> Iterator[tuple[Callable[[Output], None], Output]]:
        batch = list(self._requests.values())[: self.info.max_batch]
        self._num_steps += bool(batch)
        for running in batch:
            yield self._advance(running)

    def _advance(self, running: _Running) -> tuple[Callable[[Output], None], Output]:
        request, first = running.request, running.num_tokens
        room = self.info.max_context - len(request.prompt_ids)
        limit = min(request.sampling.max_tokens or room, room)
        running.num_tokens = min(first + self._burst, limit)
        token_ids = tuple(self._answer(request, n) for n in range(first, running.num_tokens))
        if running.num_tokens == limit:
            return self._end(running, token_ids, FinishReason.LENGTH)
        return running.sink, self._output(running, token_ids)

    def _end(
        self,
        running: _Running,
        token_ids: tuple[int, ...],
        reason: FinishReason,
        error: str = "",
    ) -> tuple[Callable[[Output], None], Output]:
        del self._requests[running.request.request_id]
        self._num_finished += 1
        return running.sink, self._output(running, token_ids, reason, error)

    def _output(
        self,
        running: _Running,
        token_ids: tuple[int, ...],
        reason: FinishReason | None = None,
        error: str = "",
    ) -> Output:
        request, sampling = running.request, running.request.sampling
        usage = timings = None
        if reason is not None:
            usage = Usage(len(request.prompt_ids), running.num_tokens, cached_tokens=1)
            timings = Timings(1.0, 2.0, float(self._num_steps), num_preemptions=3)
        prompt_logprobs = ()
        if sampling.prompt_logprobs is not None and running.num_tokens == len(token_ids):
            prompt_logprobs = _logprobs(request.prompt_ids[1:], sampling.prompt_logprobs)
        return Output(
            request.request_id,
            token_ids,
            () if sampling.logprobs is None else _logprobs(token_ids, sampling.logprobs),
            prompt_logprobs,
            reason,
            usage,
            timings,
            error,
        )


def _logprobs(token_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    top_ids, top_logprobs = tuple(range(num_top)), tuple(-0.5 * n for n in range(num_top))
    return tuple(TokenLogprobs(i, -0.25, top_ids, top_logprobs) for i in token_ids)


@dataclass(frozen=True)
class _ByteEncoder:
    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        return [*([0] if add_special_tokens else []), *text.encode()]


def byte_tokenizer() -> Tokenizer:
    """An id is a byte; 0 is both BOS and the end."""
    return Tokenizer(
        _ByteEncoder(),
        tuple(bytes([i]) for i in range(256)),
        special_ids=frozenset({0}),
        bos_id=0,
        eos_ids=(0,),
        leading_spaces=0,
    )


def text_front(engine: FakeEngine) -> Front:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    return Front(engine, byte_tokenizer(), ChatTemplate({"default": template}))


@contextmanager
def served(front: Front, more: Sequence[Service] = ()) -> Iterator[str]:
    """The address of a server of `front`, with `more` services, on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gRPC server")
    thread.start()

    async def start() -> GrpcServer:
        server = GrpcServer(front, "127.0.0.1:0", more)
        await server.start()
        return server

    try:
        server = asyncio.run_coroutine_threadsafe(start(), loop).result(TIMEOUT_S)
        try:
            yield f"127.0.0.1:{server.port}"
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _main() -> None:
    with FakeEngine(stepped=True) as engine:
        server = GrpcServer(text_front(engine), "127.0.0.1:0")
        await server.start()
        print(server.port, flush=True)
        asyncio.get_running_loop().add_reader(sys.stdin, _step_per_line, engine)
        await run_until_signalled(server, grace_s=TIMEOUT_S)


def _step_per_line(engine: FakeEngine) -> None:
    if sys.stdin.readline():
        engine.allow(1)


if __name__ == "__main__":
    asyncio.run(_main())
