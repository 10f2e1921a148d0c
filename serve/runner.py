"""The device side of one replica: programs compiled ahead, steps dispatched without waiting.

It owns the device's state (pages, slots) and turns a StepPlan into one packed array. It does not
know why rows were chosen.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from cache.pages import NULL_PAGE
from cache.tiers.counts import TierReport
from cache.transfers.sending import Sending
from model.kernel_choice import fallbacks, note_fallback
from model.sampling import History, Logprobs
from model.step import State, StepOutput, StepShape
from serve.packing import SAMPLING_WIDTH, padding_row, sampling_row
from serve.page_mover import PageMover
from serve.plan import Send, Sequence, StepPlan
from serve.profile import Kind, Phase, Step, Work
from serve.program_cache import CompiledStep, ProgramCache, jax_cache_off
from serve.programs import Programs, activation_bytes, step_shapes
from serve.request import TokenLogprobs
from serve.scheduler import RowResult
from serve.tier_traffic import TierTraffic

log = logging.getLogger("weft")

MOST_COMPILERS = 8
"""Programs compiled at once: a large one takes a GiB or so of the host's memory."""
TELL_S = 1.0
"""Between two words on how far compiling is: a large program takes minutes."""


class Runner:
    """`submit` dispatches a plan; its `Pending` result is read a step later."""

    def __init__(
        self,
        programs: Programs,
        weights: Any,
        tables: NDArray[np.int32],
        kept: ProgramCache | None = None,
        mover: PageMover | None = None,
        traffic: TierTraffic | None = None,
        prefills_only: bool = False,
    ) -> None:
        """`tables` are the scheduler's page tables: read at each `pack`, a row per slot. `mover` is
        there where pages leave the devices or come to them, `traffic` where that is to tiers. Who
        `prefills_only` decodes nothing."""
        self.programs = programs
        self.shapes = [
            shape
            for shape in step_shapes(programs.limits, programs.partition.stages)
            if not (prefills_only and shape.num_decode)
        ]
        self.num_compiled_late = 0
        """Programs compiled after `compile_all`: each is a step that waited."""
        self._weights = jax.tree.leaves(weights)
        self._state = programs.new_state()
        # On a CPU the host reads the device's memory as it is.
        self._copies_ahead = programs.mesh.devices.flat[0].platform != "cpu"
        self._compiled: dict[StepShape, Any] = {}
        self._kept = kept
        self._mover, self._traffic = mover, traffic
        self._wake: Callable[[], None] = lambda: None
        self._tracing = threading.Lock()
        self._is_warm = False
        self._tables = tables
        self._vocab_size = programs.partition.config.vocab_size
        self._sampling = np.zeros((programs.limits.max_batch + 1, SAMPLING_WIDTH), np.int32)
        self._sampling[-1] = padding_row(self._vocab_size)

    def pack(self, plan: StepPlan, step: Step) -> "Packed | None":
        """What the device needs to know of the plan, with the page tables as they are now; None
        where it has no rows. The time it takes goes into `step`."""
        with step.phase(Phase.PACK):
            for sequence in plan.admitted:
                assert sequence.slot is not None, "who is admitted has a slot"
                self._sampling[sequence.slot] = sampling_row(sequence, self._vocab_size)
            if not plan.rows:
                return None
            shape = self._bucket(plan)
            packed = self.programs.packing(shape).pack(plan, self._sampling, self._tables)
        return Packed(plan, shape, packed)

    def prepare(self, plan: StepPlan, step: Step) -> None:
        """Dispatches what the plan wants to be done before its rows advance."""
        if not (plan.admitted or plan.moves_pages):
            return
        with step.phase(Phase.DISPATCH):
            for sequence in plan.admitted:
                self._begin_history(sequence)
            if self._traffic is not None:
                self._traffic.save(self._state, plan.saves)
            if self._mover is not None:
                self._send(self._mover, plan.sends)
                self._state = self._mover.land(self._state, plan.landings)
            if plan.copies:
                self._copy(plan.copies)

    def submit(self, packed: "Packed", step: Step) -> "Pending":
        """Dispatches the step and returns at once; the times it takes go into `step`."""
        plan, shape = packed.plan, packed.shape
        if shape not in self._compiled:
            with step.phase(Phase.COMPILE):
                self._compile_late(shape)
        with step.phase(Phase.DISPATCH):
            # NumPy's array goes in as it is: `device_put` first costs more than the rest of a call.
            self._state, output = self._compiled[shape](self._weights, self._state, packed.array)
            if self._copies_ahead:
                output.tokens.copy_to_host_async()
        step.dispatched(_work(plan, shape), output.tokens.is_ready)
        return Pending(plan, shape, self.programs.partition.stages, output, step)

    def _send(self, mover: PageMover, sends: ListLike[Send]) -> None:
        """Starts to read the pages for the engines that wait for them, each one's together."""
        for sending, some in groupby(sends, lambda send: send.sending):
            numbers, pages = zip(*((send.number, send.page) for send in some), strict=True)
            then = partial(self._deliver, sending, numbers)
            destination = mover.images if sending.stays_on_devices else mover.destination
            mover.read(self._state, pages, then, destination)

    def _deliver(self, sending: Sending, numbers: ListLike[int], images: ListLike[Any]) -> None:
        try:
            if len(images) < len(numbers):
                sending.lose()
            else:
                sending.deliver(numbers[0], images)
        finally:
            sending.num_delivered += len(numbers)
            self._wake()

    def compile_all(
        self, progress: Callable[[str, int, int], None] = lambda name, done, kept: None
    ) -> None:
        """Compiles every bucket, or reads it; afterwards no plan compiles anything.

        `progress` is told, each second or so, the name of a program at hand, how many are done, and
        how many of those were kept from an earlier start.
        """
        num_kept = 0
        workers = min(len(os.sched_getaffinity(0)), MOST_COMPILERS)
        # XLA releases the interpreter while it compiles.
        with self._only_kept_here(), ThreadPoolExecutor(workers) as pool:
            left = {pool.submit(self._compile, shape): shape for shape in self.shapes}
            try:
                while left:
                    for future in wait(left, TELL_S, FIRST_COMPLETED).done:
                        num_kept += future.result()
                        del left[future]
                    at_hand = (
                        _describe(shape) for future, shape in left.items() if future.running()
                    )
                    progress(next(at_hand, ""), len(self.shapes) - len(left), num_kept)
            finally:
                pool.shutdown(cancel_futures=True)
        self._set_history(self.programs.limits.max_batch, [], [])
        self._copy([(NULL_PAGE, NULL_PAGE)])
        if self._mover is not None:
            self._state = self._mover.compile_all(self._state)
        if self._traffic is not None:
            self._time_prefill(self._traffic)
        self._is_warm = True

    def _time_prefill(self, traffic: TierTraffic) -> None:
        """Tells the tiers what computing takes, so that the first prompt may come from them: by a
        step of rows that are nobody's, which is a little less than with anybody's."""
        alone = [shape for shape in self.shapes if not shape.num_decode]
        if not alone:
            return
        shape = max(alone, key=lambda shape: shape.num_tokens)
        packed = self.programs.packing(shape).pack(StepPlan(), self._sampling, self._tables)
        for _ in range(2):
            started_s = time.perf_counter()
            self._state, output = self._compiled[shape](self._weights, self._state, packed)
            output.tokens.block_until_ready()
            seconds = time.perf_counter() - started_s
        traffic.observe_prefill(shape.num_tokens, seconds)

    def start(self, wake: Callable[[], None]) -> None:
        """`wake` is called when pages have arrived from the tiers or left, from another thread."""
        self._wake = wake
        if self._traffic is not None:
            self._traffic.start(wake)

    def tiers(self) -> list[TierReport]:
        return self._traffic.reports() if self._traffic is not None else []

    def close(self, grace_s: float) -> None:
        """Lets the tiers keep what is on its way to them, for up to `grace_s`."""
        if self._mover is not None:
            self._mover.close()
        if self._traffic is not None:
            self._traffic.close(grace_s)

    @property
    def activation_bytes(self) -> int:
        """What the compiled steps need of each device at most, beside weights and state."""
        return max(map(activation_bytes, self._compiled.values()))

    def _bucket(self, plan: StepPlan) -> StepShape:
        """The smallest compiled shape that holds the plan."""
        longest = max((row.length for row in plan.chunks), default=0)
        fitting = [
            shape
            for shape in self.shapes
            if shape.num_decode >= len(plan.decode)
            and shape.num_chunks >= len(plan.chunks)
            and shape.chunk >= longest
            and shape.max_tokens >= plan.num_tokens
        ]
        assert fitting, f"no bucket for {len(plan.decode)} + {len(plan.chunks)} rows"
        return min(fitting, key=lambda s: (s.num_tokens, s.num_decode, s.max_tokens))

    def _compile_late(self, shape: StepShape) -> None:
        if self._is_warm:
            self.num_compiled_late += 1
            log.warning("compiling %s while serving", _describe(shape))
        with self._only_kept_here():
            self._compile(shape)

    def _only_kept_here(self) -> AbstractContextManager[None]:
        return jax_cache_off() if self._kept else nullcontext()

    def _compile(self, shape: StepShape) -> bool:
        """Whether it was kept from an earlier start."""
        started = time.monotonic()
        step = self._kept.get(self.programs, shape) if self._kept else None
        if was_kept := step is not None:
            for fallback in step.fallbacks:
                note_fallback(*fallback)
        else:
            lowered, noted = self._lower(shape)
            step = CompiledStep(lowered.compile(), noted)
            if self._kept:
                self._kept.put(self.programs, shape, step)
        self._compiled[shape] = step.program
        verb = "read" if was_kept else "compiled"
        log.debug("%s %s in %.1f s", verb, _describe(shape), time.monotonic() - started)
        return was_kept

    def _lower(self, shape: StepShape) -> tuple[Any, tuple[tuple[str, str, str], ...]]:
        """The step as XLA takes it, and the fallbacks noted on the way."""
        arguments = self.programs.abstract_arguments(shape)
        # One at a time, which the interpreter sees to anyhow: so that what is noted is this one's.
        with self._tracing:
            before = Counter(fallbacks)
            lowered = self.programs.jit_step(shape).lower(*arguments)
            return lowered, tuple((fallbacks - before).elements())

    def _copy(self, copies: ListLike[tuple[int, int]]) -> None:
        """Copies pages, as (source, target)."""
        most = self.programs.limits.max_chunk_rows
        for first in range(0, len(copies), most):
            some = np.zeros((2, most), np.int32)
            num = len(copies[first : first + most])
            some[:, :num] = np.transpose(copies[first : first + most])
            self._state = self._copy_program(self._state, *some, np.int32(num))

    @cached_property
    def _copy_program(self) -> Any:
        return self.programs.jit_copy()

    def _begin_history(self, sequence: Sequence) -> None:
        """Lets a slot know which tokens its new sequence has, where they count."""
        slot = sequence.slot
        if slot is None:
            return  # another thread aborted it since the step was planned
        if sequence.request.sampling.has_penalties:
            num_prompt = sequence.num_prompt
            prompt, output = sequence.tokens[:num_prompt], sequence.tokens[num_prompt:]
            self._set_history(slot, prompt, output)

    def _set_history(self, slot: int, prompt: list[int], output: list[int]) -> None:
        in_prompt = np.zeros(self._vocab_size, np.bool_)
        in_prompt[prompt] = True
        num_output = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
        self._state = self._set_history_program(self._state, np.int32(slot), in_prompt, num_output)

    @cached_property
    def _set_history_program(self) -> Any:
        def set_history(
            state: State, slot: jax.Array, in_prompt: jax.Array, num_output: jax.Array
        ) -> State:
            history = History(
                state.history.in_prompt.at[slot].set(in_prompt),
                state.history.num_output.at[slot].set(num_output),
            )
            return replace(state, history=history)

        return jax.jit(set_history, donate_argnums=0)


@dataclass(frozen=True)
class Packed:
    """A step that can be dispatched."""

    plan: StepPlan
    shape: StepShape
    array: NDArray[np.int32]


@dataclass(frozen=True)
class Pending:
    """A step under way."""

    plan: StepPlan
    shape: StepShape
    micro_batches: int
    output: StepOutput
    step: Step
    """Its times."""

    def wait(self) -> None:
        """Until the step's tokens are on the host."""
        np.asarray(self.output.tokens)

    def results(self) -> list[RowResult]:
        """Waits for the step; one result per row of the plan, in its order."""
        tokens_RK = _by_row(self.output.tokens).T.tolist()
        results: list[RowResult] = []
        for i, (row, place) in enumerate(zip(self.plan.rows, self._places(), strict=True)):
            token_ids = tokens_RK[place][: row.num_tokens]
            sampling = row.sequence.request.sampling
            chosen: list[TokenLogprobs] = []
            before: list[TokenLogprobs] = []
            if sampling.logprobs is not None:
                at = np.s_[:, place]
                chosen = _logprobs(token_ids, self._chosen_logprobs, at, sampling.logprobs)
            if row.targets:
                num_top = sampling.prompt_logprobs or 0
                at = divmod(i - len(self.plan.decode), self._rows_per_micro_batch[1])
                before = _logprobs(row.targets, self._prompt_logprobs, at, num_top)
            results.append(RowResult(token_ids, chosen, before))
        return results

    @property
    def _rows_per_micro_batch(self) -> tuple[int, int]:
        """Decode rows and prefill rows."""
        return (
            self.shape.num_decode // self.micro_batches,
            self.shape.num_chunks // self.micro_batches,
        )

    def _places(self) -> list[int]:
        """Where each row of the plan stands among all micro-batches' rows."""
        B, G = self._rows_per_micro_batch
        decode = [i // B * (B + G) + i % B for i in range(len(self.plan.decode))]
        chunks = [i // G * (B + G) + B + i % G for i in range(len(self.plan.chunks))]
        return decode + chunks

    @cached_property
    def _chosen_logprobs(self) -> Logprobs:
        """[K, rows of all micro-batches]."""
        return jax.tree.map(_by_row, self.output.logprobs)

    @cached_property
    def _prompt_logprobs(self) -> Logprobs:
        """[M, R, T] of the prefill rows."""
        return jax.tree.map(np.asarray, self.output.prompt_logprobs)


def _by_row(array: jax.Array) -> np.ndarray:
    """[K, M, R, ...] on the host, as [K, M * R, ...]."""
    host = np.asarray(array)
    return host.reshape(host.shape[0], -1, *host.shape[3:])


def _logprobs(
    token_ids: tuple[int, ...] | list[int], found: Logprobs, place: Any, num_top: int
) -> list[TokenLogprobs]:
    """The logprobs at `place`, which has a row for each of `token_ids` and perhaps more."""
    chosen, top, top_ids = (
        array[place].tolist() for array in (found.chosen, found.top, found.top_ids)
    )
    return [
        TokenLogprobs(token, chosen[i], tuple(top_ids[i][:num_top]), tuple(top[i][:num_top]))
        for i, token in enumerate(token_ids)
    ]


def _work(plan: StepPlan, shape: StepShape) -> Work:
    if plan.chunks:
        kind = Kind.MIXED if plan.decode else Kind.PREFILL
    else:
        kind = Kind.LOOP if shape.max_tokens > 1 else Kind.DECODE
    num_tokens = sum(row.num_tokens for row in plan.decode)
    num_tokens += sum(row.length for row in plan.chunks)
    return Work(kind, _describe(shape), len(plan.decode) + len(plan.chunks), num_tokens)


def _describe(shape: StepShape) -> str:
    rows = f"{shape.num_decode} decode x {shape.max_tokens}"
    return f"{rows} + {shape.num_chunks} prefill x {shape.chunk}" if shape.num_chunks else rows
