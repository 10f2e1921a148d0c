"""The engine as a server builds it, with random weights, under a load of requests; its figures.

It does not know text or the wire, and builds an engine without a configuration, which needs more
packages than a machine with GPUs may have.
"""

import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cache.pages import PagePool
from cache.tables import PageTables
from model.kernel_choice import kernels_for
from model.partition import Partition
from model.step import StepShape
from plan.ahead import once
from plan.devices import Devices
from plan.figures import find_memory_bytes
from plan.fill import random_weights
from plan.kernel_choice import asked_kernels
from plan.kinds.kind import Outcome
from plan.kinds.serving import Serving
from plan.models import load_model
from serve.engine import Engine, ModelInfo
from serve.limits import Limits
from serve.profile import Phase, Step
from serve.programs import CacheShape, Programs, powers_of_two, step_shapes
from serve.request import FinishReason, GenerateRequest, Output, SamplingParams
from serve.runner import Runner
from serve.scheduler import Scheduler
from serve.trace import NUM_KEPT, summarize
from sharding.mesh import MeshShape, make_meshes

MEMORY_SHARE = 0.85
"""Of a device, for weights and pages; the rest is for what steps need for a while."""
RAMP_LIMIT_S = 60.0
"""A closed loop that has not filled the batch by then, for want of pages, is measured as it is."""
POLL_S = 0.005

clock = time.monotonic


def jobs(serving: Serving, devices: Devices) -> Sequence[Callable[[], object]]:
    """Its programs, to be compiled ahead."""
    if devices.described:
        return []
    programs = _programs(serving, devices)
    return [programs.jit_step(shape).compile for shape in shapes(serving)]


def measure(serving: Serving, devices: Devices) -> Outcome:
    if devices.described:
        raise ValueError(f"serving is measured on devices that run, and {devices} is described")
    programs = _programs(serving, devices)
    if programs.cache.num_pages <= -(-(serving.prompt + serving.output) // serving.page_size):
        return Outcome(misfit="the memory beside the weights holds no request; use a smaller model")
    with _engine(serving, programs) as engine:
        load = Load(engine, serving)
        timed = _closed_loop(load) if serving.window_s else _batch(load)
        return Outcome(timed | {"num_preemptions": engine.load().num_preemptions})


def shapes(serving: Serving) -> list[StepShape]:
    """The server's programs, but for decode of fewer rows than there are requests."""
    rows = powers_of_two(min(serving.concurrency, serving.max_batch))[-1]
    found = step_shapes(_limits(serving), 1)
    alone = [shape for shape in found if not shape.num_chunks and shape.num_decode == rows]
    chunks = [shape for shape in found if shape.num_chunks]
    return alone + [shape for shape in chunks if rows > 1 or not shape.num_decode]


class KeptPrograms(Programs):
    """Programs that a process compiles once, for all its engines."""

    def jit_step(self, shape: StepShape) -> "_Kept":
        return _Kept(self, shape, super().jit_step)


@dataclass(frozen=True)
class _Kept:
    """As much of a jitted function as is needed to compile it."""

    programs: Programs
    shape: StepShape
    jit: Callable[[StepShape], Any]

    def lower(self, *_: Any) -> "_Kept":
        return self

    def compile(self) -> Any:
        return once((self.programs, self.shape), self._compile)

    def _compile(self) -> Any:
        arguments = self.programs.abstract_arguments(self.shape)
        return self.jit(self.shape).lower(*arguments).compile()


@dataclass
class Load:
    """Requests of an engine, and when their tokens came; sinks run on the engine's thread."""

    engine: Engine
    serving: Serving
    tokens: list[tuple[float, int]] = field(default_factory=list)
    """When, and how many."""
    firsts: list[tuple[float, float]] = field(default_factory=list)
    """When a request's first token came, and how long after the request."""
    between: list[tuple[float, float, int]] = field(default_factory=list)
    """When tokens came after others, the seconds of each, and how many."""
    ends: "queue.SimpleQueue[tuple[float, Output]]" = field(default_factory=queue.SimpleQueue)
    num_submitted: int = 0
    num_ended: int = 0

    def submit(self, prompt: int, output: int) -> None:
        self.num_submitted += 1
        name = f"request-{self.num_submitted}"
        ids = random.Random(self.num_submitted).choices(
            range(self.engine.info.vocab_size), k=prompt
        )
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        submitted_s = clock()
        last_s: float | None = None

        def sink(given: Output) -> None:
            nonlocal last_s
            now_s, num_tokens = clock(), len(given.token_ids)
            if num_tokens:
                self.tokens.append((now_s, num_tokens))
                if last_s is None:
                    self.firsts.append((now_s, now_s - submitted_s))
                else:
                    self.between.append((now_s, (now_s - last_s) / num_tokens, num_tokens))
                last_s = now_s
            if given.finish_reason is not None:
                self.ends.put((now_s, given))

        self.engine.submit(GenerateRequest(name, tuple(ids), sampling), sink)

    def wait_end(self, timeout_s: float | None = None) -> bool:
        """Whether a request ended within `timeout_s`. Raises RuntimeError if not by its length."""
        try:
            _, output = self.ends.get(timeout=timeout_s)
        except queue.Empty:
            return False
        self.num_ended += 1
        if output.finish_reason is not FinishReason.LENGTH:
            raise RuntimeError(
                f"{output.request_id} ended by {output.finish_reason}: {output.error}"
            )
        return True

    def figures(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Of the time between."""

        def inside(rows: Sequence[Any]) -> list[Any]:
            return [row for row in rows if begin_s < row[0] <= end_s]

        num_tokens = sum(count for _, count in inside(self.tokens))
        firsts = [seconds for _, seconds in inside(self.firsts)]
        between = inside(self.between)
        each = np.repeat([row[1] for row in between], [row[2] for row in between])
        # A step is of the time in which it was dispatched.
        dispatched = [
            step
            for step in self.engine.profiles[0].steps()
            if begin_s < step.spans[Phase.DISPATCH][0] <= end_s
        ]
        return {
            "window_s": end_s - begin_s,
            "output_tokens_per_s": num_tokens / (end_s - begin_s),
            **_percentiles("ttft", firsts),
            **_percentiles("between_tokens", each),
            **_profile(dispatched),
        }


def _batch(load: Load) -> dict[str, Any]:
    """All requests at once, until the last is answered."""
    serving = load.serving

    def answer(output: int) -> None:
        for _ in range(serving.concurrency):
            load.submit(serving.prompt, output)
        for _ in range(serving.concurrency):
            load.wait_end()

    answer(min(serving.output, 2 * serving.max_steps + 1))  # programs' first runs are not timed
    load.engine.profiles[0].keep(NUM_KEPT)
    begin_s = clock()
    answer(serving.output)
    figures = load.figures(begin_s, clock())
    # From the moment on in which nobody waits for a first token.
    full_s = load.firsts[-1][0]
    decoded = [(when, count) for when, count in load.tokens if when > full_s]
    if decoded:
        seconds = decoded[-1][0] - full_s
        figures["decode_tokens_per_s"] = sum(count for _, count in decoded) / seconds
    return figures


def _closed_loop(load: Load) -> dict[str, Any]:
    """As it is after a long time: requests begin as if they had come one after the other."""
    serving, engine = load.serving, load.engine
    running = min(serving.concurrency, serving.max_batch)
    spread = random.Random(0)
    begin_s = clock()
    for i in range(serving.concurrency):
        done = spread.randrange(serving.output) if i < running else 0
        load.submit(serving.prompt + done, serving.output - done)

    def go_on_until(is_over: Callable[[], bool]) -> None:
        while not is_over():
            if load.wait_end(POLL_S):
                load.submit(serving.prompt, serving.output)

    go_on_until(lambda: len(load.firsts) >= running or clock() > begin_s + RAMP_LIMIT_S)
    engine.profiles[0].keep(NUM_KEPT)
    full_s, ended = clock(), load.num_ended
    go_on_until(lambda: clock() > full_s + serving.window_s)
    figures = load.figures(full_s, clock())
    finished = load.num_ended - ended
    return figures | {"ramp_s": full_s - begin_s, "num_finished": finished}


def _profile(steps: Sequence[Step]) -> dict[str, Any]:
    """Where the time of the most frequent kind of step went."""
    found = summarize(steps)
    if not found:
        return {}
    most = max(found, key=lambda summary: summary.num_steps)
    return {
        "step_kind": most.kind.value,
        "num_steps": most.num_steps,
        "step_rows": most.num_rows,
        "turn_s": most.step.median_s,
        **{f"{phase.value}_s": spread.median_s for phase, spread in most.phases.items()},
        "host_gap_least_s": most.gap_least.median_s,
        "host_gap_s": most.gap_most.median_s,
        "host_gap_p90_s": most.gap_most.p90_s,
    }


def _percentiles(name: str, seconds: Any) -> dict[str, float]:
    if not len(seconds):
        return {}
    median_s, p99_s = np.quantile(seconds, [0.5, 0.99]).tolist()
    return {f"{name}_median_s": median_s, f"{name}_p99_s": p99_s}


@contextmanager
def _engine(serving: Serving, programs: Programs) -> Iterator[Engine]:
    """Running; stopped at the end."""
    pool = PagePool(programs.cache.num_pages, serving.page_size)
    tables = PageTables(pool, serving.max_batch + 1, programs.table_width)
    runner = Runner(programs, random_weights(programs), tables.array)
    runner.shapes = shapes(serving)
    runner.compile_all()
    model = programs.partition.config
    info = ModelInfo(
        name=serving.model,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_context=serving.max_context,
        dtype=jnp.dtype(programs.dtype).name,
        mesh=dict(programs.mesh.shape) | {"data": 1},
        num_pages=pool.num_usable,
        page_size=pool.page_size,
        max_batch=serving.max_batch,
        eos_ids=(),
    )
    scheduler = Scheduler(_limits(serving), tables, frozenset())
    engine = Engine(info, scheduler, runner, random.Random(0), clock)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _programs(serving: Serving, devices: Devices) -> KeptPrograms:
    model = load_model(serving.model, quantization=serving.quantization)
    partition, mesh = Partition(model, 1, 1), make_meshes(MeshShape())[0]
    dtype = jnp.dtype(model.dtype if serving.dtype == "auto" else serving.dtype)
    cache_dtype = dtype if serving.cache_dtype == "auto" else jnp.dtype(serving.cache_dtype)
    width = -(-serving.max_context // serving.page_size)
    programs = KeptPrograms(
        partition,
        mesh,
        CacheShape(1, serving.page_size, cache_dtype),
        # Programs are the same whatever these two are.
        replace(_limits(serving), max_steps=1, max_queue=1),
        width,
        dtype,
        kernels_for(mesh.devices.flat[0].platform, asked_kernels(serving.kernels)),
    )
    weights, _, _ = programs.abstract_arguments(StepShape(1, 0, serving.chunk, 1))
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    room = int(MEMORY_SHARE * find_memory_bytes(devices, None)) - weight_bytes
    most = max(0, room) // programs.cache.page_bytes(partition)
    # Nobody is admitted unless a page is free for each that runs.
    num_pages = 1 + min(most, serving.max_batch * (width + 1))
    return replace(programs, cache=replace(programs.cache, num_pages=num_pages))


def _limits(serving: Serving) -> Limits:
    return Limits(
        max_batch=serving.max_batch,
        token_budget=serving.token_budget,
        chunk=serving.chunk,
        max_steps=serving.max_steps,
        max_queue=max(1, serving.concurrency),
        max_context=serving.max_context,
    )
