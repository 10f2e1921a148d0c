"""The jitted programs of one mesh: compiled ahead for a fixed grid of shapes, dispatched without waiting.

It owns the device's state (pages, slots) and turns a StepPlan into one packed array. It does not know
why rows were chosen.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from model.partition import Partition, weight_specs
from model.sampling import History
from model.step import State, StepOutput, StepShape, step
from serve.packing import SAMPLING_WIDTH, Packing, sampling_row
from serve.plan import Row, Sequence, StepPlan
from serve.request import TokenLogprobs
from serve.scheduler import Limits, RowResult
from sharding.rules import PAGES, REPLICATED

log = logging.getLogger("weft")

Dtype = Any


def powers_of_two(largest: int, multiple: int = 1) -> list[int]:
    """multiple, 2 x multiple, 4 x ... up to the first that reaches `largest`."""
    sizes = [multiple]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return sizes


def step_shapes(limits: Limits, stages: int) -> list[StepShape]:
    """The grid: decode alone, one token and many; prefill alone, and beside a full batch."""
    batches = powers_of_two(limits.max_batch, stages)
    chunks = powers_of_two(limits.max_chunk_rows, stages)
    many = [limits.max_steps] if limits.max_steps > 1 else []
    decode = [StepShape(B, 0, limits.chunk, K) for K in [1, *many] for B in batches]
    mixed = [StepShape(B, G, limits.chunk, 1) for B in (0, batches[-1]) for G in chunks]
    return decode + mixed


@dataclass(frozen=True)
class CacheShape:
    """The pages of one layer slot, over all devices."""

    num_pages: int
    page_size: int
    dtype: Dtype

    def arrays(self, partition: Partition) -> jax.ShapeDtypeStruct:
        config = partition.fitted
        shape = (partition.stages, self.num_pages, self.page_size)
        return jax.ShapeDtypeStruct(
            (*shape, config.num_kv_heads, config.head_dim), jnp.dtype(self.dtype)
        )


def page_bytes(partition: Partition, page_size: int, dtype: Dtype) -> int:
    """Bytes one page takes on each device: K and V of all its layers."""
    config = partition.fitted
    per_token = config.num_kv_heads // partition.tensor * config.head_dim
    layer_bytes = page_size * per_token * jnp.dtype(dtype).itemsize
    return 2 * partition.layers_per_stage * layer_bytes


class Runner:
    """One replica's device side: `submit` a plan, read its `Pending` result a step later."""

    def __init__(
        self,
        partition: Partition,
        mesh: Mesh,
        graph: Any,
        weights: Any,
        cache: CacheShape,
        limits: Limits,
        table_width: int,
        tables: NDArray[np.int32],
    ) -> None:
        self.partition = partition
        self.mesh = mesh
        self.limits = limits
        self.num_compiled_late = 0
        """Programs compiled after `compile_all`: each is a step that waited."""
        self._graph = graph
        # jit flattens a list of arrays in C++; a module's state would be walked in Python every step.
        self._weights, self._weights_tree = jax.tree.flatten(weights)
        self._specs = jax.tree.leaves(
            weight_specs(weights), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
        )
        self._tables = tables
        self._table_width = table_width
        self._vocab_size = partition.config.vocab_size
        self._sampling = np.zeros((limits.max_batch + 1, SAMPLING_WIDTH), np.int32)
        self._sampling[-1] = _padding_sampling(self._vocab_size)
        self._state_shapes = self._abstract_state(cache)
        self._state = self._new_state()
        self._programs: dict[StepShape, Any] = {}
        self.shapes = step_shapes(limits, partition.stages)

    def submit(self, plan: StepPlan) -> "Pending":
        """Dispatches the plan's step and returns at once."""
        for sequence in plan.admitted:
            self._admit(sequence)
        shape = self._bucket(plan)
        packed = jax.device_put(
            self._packing(shape).pack(plan, self._sampling, self._tables), self._replicated
        )
        self._state, output = self._program(shape)(self._weights, self._state, packed)
        return Pending(plan, shape, self.partition.stages, output)

    def compile_all(self, progress: Callable[[str, int], None] = lambda name, done: None) -> None:
        """Compiles every bucket; afterwards no plan compiles anything."""
        # Tracing holds the interpreter, XLA does not: two threads keep a second core busy.
        with ThreadPoolExecutor(2) as pool:
            for shape in pool.map(self._compile, self.shapes):
                progress(_describe(shape), 1)
        self._set_history_program  # noqa: B018  (compiled on first use, which is here)
        self._set_history(self.limits.max_batch, [], [])

    def _bucket(self, plan: StepPlan) -> StepShape:
        """The smallest compiled shape that holds the plan."""
        fitting = [
            shape
            for shape in self.shapes
            if shape.num_decode >= len(plan.decode)
            and shape.num_chunks >= len(plan.chunks)
            and shape.max_tokens >= plan.num_tokens
        ]
        assert fitting, (
            f"no bucket for {len(plan.decode)} decode and {len(plan.chunks)} prefill rows"
        )
        return min(fitting, key=lambda s: (s.num_chunks, s.num_decode, s.max_tokens))

    def _packing(self, shape: StepShape) -> Packing:
        return Packing(shape, self.partition.stages, self._table_width)

    def _program(self, shape: StepShape) -> Any:
        if shape not in self._programs:
            self.num_compiled_late += 1
            log.warning("compiling %s while serving", _describe(shape))
            self._compile(shape)
        return self._programs[shape]

    def _compile(self, shape: StepShape) -> StepShape:
        started = time.monotonic()
        packing = self._packing(shape)
        width = packing.pack(StepPlan(), self._sampling, self._tables).shape[1]
        packed = jax.ShapeDtypeStruct((self.partition.stages, width), jnp.int32)
        abstract = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in self._weights]
        self._programs[shape] = (
            self._jit(packing).lower(abstract, self._state_shapes, packed).compile()
        )
        log.debug("compiled %s in %.1f s", _describe(shape), time.monotonic() - started)
        return shape

    def _jit(self, packing: Packing) -> Any:
        """The one place where the step is jitted; its state is donated."""
        specs = jax.tree.map(_state_spec, self._state_shapes)

        def run(weights: list[jax.Array], state: State, packed: jax.Array) -> Any:
            local = _squeeze_stages(jax.tree.unflatten(self._weights_tree, weights))
            decoder = nnx.merge(self._graph, local)
            batch = packing.unpack(packed)
            state = _map_pages(lambda pages: pages[0], state)
            state, output = step(decoder, packing.shape, state, batch)
            return _map_pages(lambda pages: pages[None], state), output

        sharded = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(self._specs, specs, REPLICATED),
            out_specs=(specs, REPLICATED),
            check_vma=False,
        )
        return jax.jit(
            sharded,
            in_shardings=(self._shardings(self._specs), self._shardings(specs), self._replicated),
            out_shardings=(self._shardings(specs), self._replicated),
            donate_argnums=1,
        )

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, REPLICATED)

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
        )

    def _abstract_state(self, cache: CacheShape) -> State:
        pages = cache.arrays(self.partition)
        slots = self.limits.max_batch + 1
        return State(
            pages=[(pages, pages) for _ in range(self.partition.layers_per_stage)],
            last_token=jax.ShapeDtypeStruct((slots,), jnp.int32),
            ended=jax.ShapeDtypeStruct((slots,), jnp.bool_),
            history=History(
                jax.ShapeDtypeStruct((slots, self._vocab_size), jnp.bool_),
                jax.ShapeDtypeStruct((slots, self._vocab_size), jnp.int32),
            ),
        )

    def _new_state(self) -> State:
        shardings = self._shardings(jax.tree.map(_state_spec, self._state_shapes))
        zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._state_shapes)
        return jax.jit(zeros, out_shardings=shardings)()

    def _admit(self, sequence: Sequence) -> None:
        """Lets a slot know its new sequence."""
        assert sequence.slot is not None, "an admitted sequence has a slot"
        self._sampling[sequence.slot] = sampling_row(sequence, self._vocab_size)
        sampling = sequence.request.sampling
        if (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
        ):
            prompt, output = (
                sequence.tokens[: sequence.num_prompt],
                sequence.tokens[sequence.num_prompt :],
            )
            self._set_history(sequence.slot, prompt, output)

    @cached_property
    def _set_history_program(self) -> Any:
        def set_history(state: State, slot: Any, in_prompt: Any, num_output: Any) -> State:
            history = History(
                state.history.in_prompt.at[slot].set(in_prompt),
                state.history.num_output.at[slot].set(num_output),
            )
            return State(state.pages, state.last_token, state.ended, history)

        return jax.jit(set_history, donate_argnums=0)

    def _set_history(self, slot: int, prompt: list[int], output: list[int]) -> None:
        in_prompt = np.zeros(self._vocab_size, np.bool_)
        in_prompt[prompt] = True
        num_output = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
        self._state = self._set_history_program(self._state, np.int32(slot), in_prompt, num_output)


@dataclass(frozen=True)
class Pending:
    """A step under way."""

    plan: StepPlan
    shape: StepShape
    micro_batches: int
    output: StepOutput

    def results(self) -> list[RowResult]:
        """Waits for the step; one result per row of the plan, in its order."""
        tokens_KR = self._by_row(self.output.tokens)
        wants = any(row.sequence.request.sampling.logprobs is not None for row in self.plan.rows)
        logprobs = jax.tree.map(self._by_row, self.output.logprobs) if wants else None
        wants = any(row.targets for row in self.plan.chunks)
        prompt = jax.tree.map(np.asarray, self.output.prompt_logprobs) if wants else None
        results: list[RowResult] = []
        for at, chunk, row in self._places():
            token_ids = tokens_KR[: row.num_tokens, at].tolist()
            sampling = row.sequence.request.sampling
            chosen: list[TokenLogprobs] = []
            if logprobs is not None and sampling.logprobs is not None:
                found = [
                    jax.tree.map(lambda a, k=k: a[k, at], logprobs) for k in range(len(token_ids))
                ]
                chosen = [
                    _token_logprobs(token, one, sampling.logprobs)
                    for token, one in zip(token_ids, found, strict=True)
                ]
            before: list[TokenLogprobs] = []
            if prompt is not None and sampling.prompt_logprobs is not None:
                for i, token in enumerate(row.targets):
                    place = (*divmod(chunk, prompt.chosen.shape[1]), i)
                    one = jax.tree.map(lambda a, place=place: a[place], prompt)
                    before.append(_token_logprobs(token, one, sampling.prompt_logprobs))
            results.append(RowResult(token_ids, chosen, before))
        return results

    def _by_row(self, array: jax.Array) -> np.ndarray:
        """[K, M, R, ...] on the host, as [K, M * R, ...]."""
        host = np.asarray(array)
        return host.reshape(host.shape[0], -1, *host.shape[3:])

    def _places(self) -> list[tuple[int, int, Row]]:
        """Each row's place among all micro-batches' rows, and among the prefill rows."""
        decode = self.shape.num_decode // self.micro_batches
        chunks = self.shape.num_chunks // self.micro_batches
        rows = decode + chunks
        places = [
            (i // decode * rows + i % decode, 0, row) for i, row in enumerate(self.plan.decode)
        ]
        places += [
            (i // chunks * rows + decode + i % chunks, i, row)
            for i, row in enumerate(self.plan.chunks)
        ]
        return places


def _token_logprobs(token: int, found: Any, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token,
        logprob=float(found.chosen),
        top_ids=tuple(found.top_ids[:num_top].tolist()),
        top_logprobs=tuple(found.top[:num_top].tolist()),
    )


def _state_spec(leaf: jax.ShapeDtypeStruct) -> jax.sharding.PartitionSpec:
    """Pages have five axes; all else in the state is replicated."""
    return PAGES if leaf.ndim == 5 else REPLICATED


def _map_pages(function: Callable[[jax.Array], jax.Array], state: State) -> State:
    pages = jax.tree.map(function, state.pages)
    return State(pages, state.last_token, state.ended, state.history)


def _squeeze_stages(weights: Any) -> Any:
    """Takes the stage axis off: a device holds the layers of one stage."""

    def squeeze(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf[0] if getattr(path[0], "key", None) == "layers" else leaf

    return jax.tree_util.tree_map_with_path(squeeze, weights)


def _padding_sampling(vocab_size: int) -> NDArray[np.int32]:
    """A greedy row that ends nowhere."""
    from serve.request import GenerateRequest, SamplingParams

    request = GenerateRequest("", (0,), SamplingParams(temperature=0.0))
    nobody = Sequence(request, 0, 0.0, 1, frozenset(), 0, [0], 1)
    return sampling_row(nobody, vocab_size)


def _describe(shape: StepShape) -> str:
    rows = f"{shape.num_decode} decode x {shape.max_tokens}"
    return f"{rows} + {shape.num_chunks} prefill x {shape.chunk}" if shape.num_chunks else rows
