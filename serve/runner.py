"""The device side of one replica: programs compiled ahead, steps dispatched without waiting.

It owns the device's state (pages, slots) and turns a StepPlan into one packed array. It does not
know why rows were chosen.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from model.sampling import History, Logprobs
from model.step import State, StepOutput, StepShape
from serve.packing import SAMPLING_WIDTH, padding_row, sampling_row
from serve.plan import Row, Sequence, StepPlan
from serve.programs import Programs, step_shapes
from serve.request import TokenLogprobs
from serve.scheduler import RowResult
from sharding.rules import REPLICATED

log = logging.getLogger("weft")


class Runner:
    """`submit` dispatches a plan; its `Pending` result is read a step later."""

    def __init__(self, programs: Programs, weights: Any, tables: NDArray[np.int32]) -> None:
        """`tables` are the scheduler's page tables: read at each submit, a row per slot."""
        self.programs = programs
        self.shapes = step_shapes(programs.limits, programs.partition.stages)
        self.num_compiled_late = 0
        """Programs compiled after `compile_all`: each is a step that waited."""
        self._weights = jax.tree.leaves(weights)
        self._state = programs.new_state()
        self._replicated = programs.shardings(REPLICATED)
        self._compiled: dict[StepShape, Any] = {}
        self._is_warm = False
        self._tables = tables
        self._vocab_size = programs.partition.config.vocab_size
        self._sampling = np.zeros((programs.limits.max_batch + 1, SAMPLING_WIDTH), np.int32)
        self._sampling[-1] = padding_row(self._vocab_size)

    def submit(self, plan: StepPlan) -> "Pending":
        """Dispatches the plan's step and returns at once."""
        for sequence in plan.admitted:
            self._admit(sequence)
        shape = self._bucket(plan)
        packed = self.programs.packing(shape).pack(plan, self._sampling, self._tables)
        packed = jax.device_put(packed, self._replicated)
        self._state, output = self._program(shape)(self._weights, self._state, packed)
        return Pending(plan, shape, self.programs.partition.stages, output)

    def compile_all(self, progress: Callable[[str, int], None] = lambda name, done: None) -> None:
        """Compiles every bucket; afterwards no plan compiles anything.

        `progress` is told each program's name, and how many are done.
        """
        # XLA releases the interpreter while it compiles: two threads keep a second core busy.
        with ThreadPoolExecutor(2) as pool:
            for done, shape in enumerate(pool.map(self._compile, self.shapes), start=1):
                progress(_describe(shape), done)
        self._set_history(self.programs.limits.max_batch, [], [])
        self._is_warm = True

    def _bucket(self, plan: StepPlan) -> StepShape:
        """The smallest compiled shape that holds the plan."""
        fitting = [
            shape
            for shape in self.shapes
            if shape.num_decode >= len(plan.decode)
            and shape.num_chunks >= len(plan.chunks)
            and shape.max_tokens >= plan.num_tokens
        ]
        assert fitting, f"no bucket for {len(plan.decode)} + {len(plan.chunks)} rows"
        return min(fitting, key=lambda s: (s.num_chunks, s.num_decode, s.max_tokens))

    def _program(self, shape: StepShape) -> Any:
        if shape not in self._compiled:
            if self._is_warm:
                self.num_compiled_late += 1
                log.warning("compiling %s while serving", _describe(shape))
            self._compile(shape)
        return self._compiled[shape]

    def _compile(self, shape: StepShape) -> StepShape:
        started = time.monotonic()
        step = self.programs.jit_step(shape)
        self._compiled[shape] = step.lower(*self.programs.abstract_arguments(shape)).compile()
        log.debug("compiled %s in %.1f s", _describe(shape), time.monotonic() - started)
        return shape

    def _admit(self, sequence: Sequence) -> None:
        """Lets a slot know its new sequence."""
        slot = sequence.slot
        if slot is None:
            return  # another thread aborted it since the step was planned
        self._sampling[slot] = sampling_row(sequence, self._vocab_size)
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
class Pending:
    """A step under way."""

    plan: StepPlan
    shape: StepShape
    micro_batches: int
    output: StepOutput

    def results(self) -> list[RowResult]:
        """Waits for the step; one result per row of the plan, in its order."""
        tokens_KR = _by_row(self.output.tokens)
        samplings = [row.sequence.request.sampling for row in self.plan.rows]
        logprobs = prompt = None
        if any(sampling.logprobs is not None for sampling in samplings):
            logprobs = jax.tree.map(_by_row, self.output.logprobs)
        if any(row.targets for row in self.plan.chunks):
            prompt = jax.tree.map(np.asarray, self.output.prompt_logprobs)
        results: list[RowResult] = []
        for i, (row, sampling) in enumerate(zip(self.plan.rows, samplings, strict=True)):
            chosen: list[TokenLogprobs] = []
            before: list[TokenLogprobs] = []
            place = self._place(i)
            token_ids = tokens_KR[: row.num_tokens, place].tolist()
            if logprobs is not None and sampling.logprobs is not None:
                chosen = _logprobs(token_ids, logprobs, np.s_[:, place], sampling.logprobs)
            if prompt is not None and row.targets:
                num_top = sampling.prompt_logprobs or 0
                before = self._prompt_logprobs(row, i, prompt, num_top)
            results.append(RowResult(token_ids, chosen, before))
        return results

    def _place(self, i: int) -> int:
        """Where row i of the plan stands among all micro-batches' rows."""
        decode = self.shape.num_decode // self.micro_batches
        chunks = self.shape.num_chunks // self.micro_batches
        num_decode = len(self.plan.decode)
        if i < num_decode:
            return i // decode * (decode + chunks) + i % decode
        i -= num_decode
        return i // chunks * (decode + chunks) + decode + i % chunks

    def _prompt_logprobs(
        self, row: Row, i: int, found: Logprobs, num_top: int
    ) -> list[TokenLogprobs]:
        chunks = self.shape.num_chunks // self.micro_batches
        place = divmod(i - len(self.plan.decode), chunks)
        return _logprobs(row.targets, found, place, num_top)


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


def _describe(shape: StepShape) -> str:
    rows = f"{shape.num_decode} decode x {shape.max_tokens}"
    return f"{rows} + {shape.num_chunks} prefill x {shape.chunk}" if shape.num_chunks else rows
