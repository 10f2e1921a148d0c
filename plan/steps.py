"""One step of a model on a mesh, built without a checkpoint: its program, and a batch for it.

It does not compile or run it (`plan/figures.py`), and knows no other settings than a step's.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from cache.pages import PagePool
from cache.tables import PageTables
from model.kernel_choice import kernels_for
from model.partition import Partition
from model.step import StepShape
from plan.described import described_mesh
from plan.devices import Devices
from plan.hardware import RowWork
from plan.kernel_choice import asked_kernels
from plan.kinds.step import Step
from plan.models import load_model
from serve.limits import Limits
from serve.packing import padding_row
from serve.plan import Row, Sequence, StepPlan
from serve.programs import CacheShape, Programs, powers_of_two
from serve.request import GenerateRequest
from sharding.mesh import make_meshes, parse_mesh
from sharding.rules import REPLICATED

NOBODY = Sequence(GenerateRequest("", (0,)), 0, 0.0, 1, frozenset(), 0, [0], 1)
NO_END = 2**30


@dataclass(frozen=True)
class BuiltStep:
    """A step's program, and the batch that it is to be given."""

    step: Step
    programs: Programs
    shape: StepShape
    plan: StepPlan
    tables: NDArray[np.int32]

    @property
    def ticks_per_step(self) -> float:
        """Turns of the loop over micro-batches and tokens, filling and draining included."""
        stages, steps = self.programs.partition.stages, self.step.steps_per_call
        return (steps * stages + stages - 1) / steps

    @property
    def arguments(self) -> Any:
        """Weights, state and packed batch, as shapes."""
        return self.programs.abstract_arguments(self.shape)

    @property
    def shardings(self) -> Any:
        """Of these."""
        return self.programs.shardings(self.programs.argument_cuts())

    def packed(self) -> jax.Array:
        """The batch as the step takes it: greedy rows that never end."""
        greedy = padding_row(self.programs.partition.config.vocab_size)
        sampling = np.tile(greedy, (len(self.tables), 1))
        packed = self.programs.packing(self.shape).pack(self.plan, sampling, self.tables)
        return jax.device_put(packed, self.programs.shardings(REPLICATED))

    @property
    def work(self) -> list[RowWork]:
        """What one step advances; of a loop, its middle one."""
        later = (self.step.steps_per_call - 1) // 2
        decode = [RowWork(1, row.start + later) for row in self.plan.decode]
        # A prompt's rows are one piece of work: its cached tokens need be read once.
        prompts = dict.fromkeys(row.slot for row in self.plan.chunks)
        starts = {
            slot: min(r.start for r in self.plan.chunks if r.slot == slot) for slot in prompts
        }
        return decode + [RowWork(self.step.prompt, start) for start in starts.values()]


def build(step: Step, devices: Devices) -> BuiltStep:
    """Raises MeshError where the model does not divide over the mesh, or devices are too few."""
    shape = parse_mesh(step.mesh)
    model = load_model(step.model, quantization=step.quantization)
    partition = Partition(model, shape.stage, shape.tensor)
    mesh = described_mesh(shape) if devices.described else make_meshes(shape)[0]
    plan = _plan(step)
    max_context = min(step.max_context, model.max_context)
    num_slots = len({row.slot for row in plan.rows})
    step_shape = StepShape(
        num_decode=_bucket(len(plan.decode), shape.stage),
        num_chunks=_bucket(len(plan.chunks), shape.stage),
        chunk=step.chunk,
        max_tokens=plan.num_tokens,
    )
    limits = Limits(
        max_batch=num_slots,
        token_budget=num_slots + max(1, step_shape.num_chunks) * step.chunk,
        chunk=step.chunk,
        max_steps=plan.num_tokens,
        max_queue=1,
        max_context=max_context,
    )
    tables = _tables(plan, num_slots, max_context, step.page_size)
    dtype = jnp.dtype(model.dtype if step.dtype == "auto" else step.dtype)
    cache_dtype = dtype if step.cache_dtype == "auto" else jnp.dtype(step.cache_dtype)
    cache = CacheShape(int(tables.max()) + 1, step.page_size, cache_dtype)
    kernels = kernels_for(mesh.devices.flat[0].platform, asked_kernels(step.kernels))
    programs = Programs(partition, mesh, cache, limits, tables.shape[1], dtype, kernels)
    return BuiltStep(step, programs, step_shape, plan, tables)


def _bucket(num_rows: int, stages: int) -> int:
    """As many rows as the server's program for them has."""
    return powers_of_two(num_rows, stages)[-1] if num_rows else 0


def _plan(step: Step) -> StepPlan:
    batch, context = range(step.batch), step.context
    if step.phase == "prefill":
        return StepPlan(chunks=[row for slot in batch for row in _prompt(step, slot, context)])
    tokens = step.steps_per_call
    decode = [Row(NOBODY, slot, context, 1, 1, NO_END, tokens) for slot in batch]
    chunks = _prompt(step, step.batch, 0) if step.phase == "mixed" else []
    return StepPlan(decode, chunks, tokens)


def _prompt(step: Step, slot: int, start: int) -> list[Row]:
    """`step.prompt` tokens of one sequence, in rows of a chunk."""
    rows: list[Row] = []
    for first in range(0, step.prompt, step.chunk):
        length = min(step.chunk, step.prompt - first)
        is_last = first + length == step.prompt
        ids = tuple(range(1, length + 1))
        rows.append(Row(NOBODY, slot, start + first, length, 0, NO_END, int(is_last), ids))
    return rows


def _tables(plan: StepPlan, num_slots: int, max_context: int, page_size: int) -> NDArray[np.int32]:
    """Page tables with the pages of all rows mixed, as those of a server are after a while."""
    ends = dict.fromkeys(range(num_slots), 0)
    for row in plan.rows:
        ends[row.slot] = max(ends[row.slot], row.start + row.length + plan.num_tokens - 1)
    num_pages = 1 + sum(-(-end // page_size) for end in ends.values())
    pool = PagePool(num_pages, page_size)
    tables = PageTables(pool, num_slots + 1, pool.pages_for(max_context))
    for slot, end in ends.items():
        tables.grow(slot, end)
    mixed = np.random.default_rng(0).permutation(num_pages - 1) + 1
    return np.concatenate([[0], mixed]).astype(np.int32)[tables.array]
