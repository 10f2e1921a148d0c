"""The jitted step of one mesh, and the fixed grid of shapes it is compiled for.

It does not hold arrays (`serve/runner.py`): everything here works on shapes, so that a step can be
compiled for devices that are not there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from model.kernel_choice import Kernels, kernels_for
from model.pages import Pages, copy_pages, empty_pages
from model.partition import Partition, abstract_weights, weight_specs
from model.sampling import History
from model.step import State, StepOutput, StepShape, step
from serve.limits import Limits
from serve.packing import Packing
from sharding.rules import PAGES, REPLICATED


def step_shapes(limits: Limits, stages: int) -> list[StepShape]:
    """The grid: decode alone, one token and many; prefill alone, and beside a full batch, there
    also a row or so that is narrower."""
    batches = powers_of_two(limits.max_batch, stages)
    chunks = powers_of_two(limits.max_chunk_rows, stages)
    steps = sorted({1, limits.max_steps})
    decode = [StepShape(B, 0, limits.chunk, K) for K in steps for B in batches]
    mixed = [StepShape(B, G, limits.chunk, 1) for B in (0, batches[-1]) for G in chunks]
    narrow = [StepShape(batches[-1], chunks[0], T, 1) for T in limits.widths[1:]]
    return decode + mixed + narrow


def powers_of_two(largest: int, multiple: int = 1) -> list[int]:
    """multiple, 2 x multiple, 4 x ... up to the first that reaches `largest`."""
    sizes = [multiple]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return sizes


@dataclass(frozen=True)
class CacheShape:
    """The page pool of one replica."""

    num_pages: int
    """The null page included."""
    page_size: int
    dtype: Any

    def page_bytes(self, partition: Partition) -> int:
        """Bytes one page takes on each device: K and V of all its layers."""
        layer = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.pages(partition)))
        devices = partition.stages * partition.tensor
        return partition.layers_per_stage * layer // (self.num_pages * devices)

    def pages(self, partition: Partition) -> Pages:
        """The shapes of one layer slot's keys and values over all devices."""
        return jax.eval_shape(lambda: self.empty(partition))

    def empty(self, partition: Partition) -> Pages:
        model = partition.fitted
        shape = (partition.stages, self.num_pages, self.page_size, model.num_kv_heads)
        return empty_pages((*shape, model.head_dim), (*shape, model.value_dim), self.dtype)


@dataclass(frozen=True)
class Programs:
    """What the steps of one mesh have in common: shapes of weights and state, and their cuts."""

    partition: Partition
    mesh: Mesh
    cache: CacheShape
    limits: Limits
    table_width: int
    dtype: Any
    asked_kernels: Kernels | None = None
    """None: those chosen for the mesh's devices."""

    @property
    def kernels(self) -> Kernels:
        return self.asked_kernels or kernels_for(self.mesh.devices.flat[0].platform)

    def abstract_weights(self) -> tuple[Any, Any]:
        """The decoder's graph, and its weights as shapes."""
        return abstract_weights(self.partition, self.dtype, self.kernels)

    def empty_state(self) -> State:
        """An empty cache and free slots."""
        slots, vocab = self.limits.max_batch + 1, self.partition.config.vocab_size
        return State(
            pages=[
                self.cache.empty(self.partition) for _ in range(self.partition.layers_per_stage)
            ],
            last_token=jnp.zeros((slots,), jnp.int32),
            ended=jnp.zeros((slots,), jnp.bool_),
            history=History(
                jnp.zeros((slots, vocab), jnp.bool_), jnp.zeros((slots, vocab), jnp.int32)
            ),
        )

    def abstract_state(self) -> State:
        """The state as shapes."""
        return jax.eval_shape(self.empty_state)

    def packing(self, shape: StepShape) -> Packing:
        return Packing(shape, self.partition.stages, self.table_width)

    def abstract_arguments(self, shape: StepShape) -> tuple[Any, State, jax.ShapeDtypeStruct]:
        """What `jit_step(shape)` takes, as shapes."""
        _, weights = self.abstract_weights()
        packing = self.packing(shape)
        packed = jax.ShapeDtypeStruct((self.partition.stages, packing.width), jnp.int32)
        return jax.tree.leaves(weights), self.abstract_state(), packed

    def argument_cuts(self) -> tuple[list[PartitionSpec], Any, PartitionSpec]:
        """How each of these lies over the mesh."""
        _, weights = self.abstract_weights()
        weight_cuts = jax.tree.leaves(weight_specs(weights), is_leaf=_is_spec)
        return weight_cuts, jax.tree.map(_state_spec, self.abstract_state()), REPLICATED

    def jit_step(self, shape: StepShape) -> Any:
        """The one place where the step is jitted: (weights, state, packed) -> (state, output).

        `weights` are the leaves of the decoder's weights: jit walks a list in C++, a module's state
        in Python. The state is donated.
        """
        graph, abstract = self.abstract_weights()
        cuts = self.argument_cuts()
        state_cuts = cuts[1]
        tree, packing = jax.tree.structure(abstract), self.packing(shape)

        def run(
            weights: list[jax.Array], state: State, packed: jax.Array
        ) -> tuple[State, StepOutput]:
            decoder = nnx.merge(graph, _without_stages(jax.tree.unflatten(tree, weights)))
            state = _map_pages(lambda pages: _in_order(pages[0]), state)
            state, output = step(decoder, shape, state, packing.unpack(packed))
            return _map_pages(lambda pages: _in_order(pages[None]), state), output

        sharded = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=cuts,
            out_specs=(state_cuts, REPLICATED),
            check_vma=False,
        )
        return jax.jit(
            sharded,
            in_shardings=self.shardings(cuts),
            out_shardings=self.shardings((state_cuts, REPLICATED)),
            donate_argnums=1,
        )

    def jit_copy(self) -> Any:
        """(state, sources, targets, how many) -> state, in which those pages are copied.

        As many as a step admits: each has `limits.max_chunk_rows` places. The state is donated.
        """

        def copy(state: State, sources: jax.Array, targets: jax.Array, num: jax.Array) -> State:
            copied = [copy_pages(pages, sources, targets, num) for pages in state.pages]
            return replace(state, pages=copied)

        cuts = self.argument_cuts()[1]
        state, whole = self.shardings(cuts), self.shardings(REPLICATED)
        return jax.jit(
            copy,
            in_shardings=(state, whole, whole, whole),
            out_shardings=state,
            donate_argnums=0,
        )

    def new_state(self) -> State:
        """The empty state, each shard made on its device."""
        cuts = jax.tree.map(_state_spec, self.abstract_state())
        return jax.jit(self.empty_state, out_shardings=self.shardings(cuts))()

    def shardings(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec)


def activation_bytes(compiled: Compiled) -> int:
    """What the compiled step needs on each device beside its arguments: temporaries, and outputs
    that take no argument's place."""
    memory: Any = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + outputs


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _state_spec(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
    """Pages have five axes and their scales four; all else in the state is replicated."""
    return PAGES if leaf.ndim >= 4 else REPLICATED


def _map_pages(function: Callable[[jax.Array], jax.Array], state: State) -> State:
    return replace(state, pages=jax.tree.map(function, state.pages))


def _in_order(pages: jax.Array) -> jax.Array:
    """Laid out as it was given.

    Of two axes of length one XLA (CPU, jaxlib 0.11.2) would choose an order that is not the
    argument's, and copy all pages of a device with one kv head.
    """
    return with_layout_constraint(pages, Layout(tuple(range(pages.ndim))))


def _without_stages(weights: Any) -> Any:
    """Takes the stage axis off: a device holds the layers of one stage."""

    def squeeze(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf[0] if getattr(path[0], "key", None) == "layers" else leaf

    return jax.tree_util.tree_map_with_path(squeeze, weights)
