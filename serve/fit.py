"""Whether a configuration fits: weights, state, activations and pages, in bytes of each device.

A start goes by an estimate of the activations; who has compiled a step can say what the compiler
says of it. It does not compile, nor know what would make a configuration fit (`serve/remedies.py`).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from model.config import Layer, ModelConfig
from model.kernel_choice import XLA, Kernels, kernels_for
from model.partition import Partition, abstract_weights, weight_specs
from model.step import StepShape
from serve.config import ConfigError, ServeConfig
from serve.limits import Limits
from serve.pace import token_cost
from serve.page_images import PageImages
from serve.prefixes import MOST_LANDED
from serve.programs import CacheShape, Programs, step_shapes
from serve.sends import MOST_SENT
from serve.tier_traffic import MOST_UNDER_WAY
from sharding.mesh import STAGE, TENSOR


@dataclass(frozen=True)
class Served:
    """What a configuration serves on devices of `platform`, as shapes: all but the pool's size."""

    config: ServeConfig
    model: ModelConfig
    platform: str

    def __post_init__(self) -> None:
        asked, possible = self.config.model.max_context, self.model.max_context
        if asked is not None and asked > possible:
            raise ConfigError(
                f"model.max_context is {asked}, the model was made for {possible}; "
                "lower it or leave it out"
            )

    @cached_property
    def partition(self) -> Partition:
        """Raises MeshError."""
        return Partition(self.model, self.config.mesh.stage, self.config.mesh.tensor)

    @property
    def dtype(self) -> Any:
        asked = self.config.model.dtype
        return jnp.dtype(self.model.dtype if asked == "auto" else asked)

    @property
    def limits(self) -> Limits:
        schedule = self.config.schedule
        return Limits(
            max_batch=schedule.max_batch,
            token_budget=schedule.token_budget,
            chunk=schedule.chunk,
            max_steps=schedule.max_steps,
            max_queue=schedule.max_queue,
            max_context=self.config.model.max_context or self.model.max_context,
            max_slowdown=schedule.max_slowdown,
            token_cost=token_cost(self.model),
        )

    @property
    def kernels(self) -> Kernels:
        """Raises ConfigError where one that is asked for can't run there, or on such weights."""
        try:
            found = kernels_for(self.platform, self.config.kernels.model_dump())
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if found.small_matmul == "xla_8bit" and not self.model.quantization:
            raise ConfigError(
                f"kernels.small_matmul is xla_8bit, and {self.config.model.path} has no weights in "
                "8 bits; set it to auto, or serve what weft convert --quantize makes of the model"
            )
        return found

    def pool(self, num_pages: int) -> CacheShape:
        """`num_pages` pages, and page 0, which takes padding's writes and holds nobody's tokens."""
        cache = self.config.cache
        named = {"auto": self.dtype, "fp8": jnp.float8_e4m3fn}
        dtype = jnp.dtype(named.get(cache.dtype, cache.dtype))
        return CacheShape(num_pages + 1, cache.tokens_per_page(self.platform), dtype)

    def programs(self, num_pages: int, mesh: Any, kernels: Kernels) -> Programs:
        pool, limits = self.pool(num_pages), self.limits
        width = -(-limits.max_context // pool.page_size)
        return Programs(self.partition, mesh, pool, limits, width, self.dtype, kernels)


@dataclass(frozen=True)
class Fit:
    """What one device has, and what is needed of it."""

    memory_bytes: int
    """All that a program may use."""
    budget_bytes: int
    """What of it a start may plan with: the share of cache.memory_fraction or, where cache.pages
    says how many pages, all."""
    weight_bytes: int
    state_bytes: int
    """Of the slots: last tokens, and the history that penalties look back on."""
    moving_bytes: int
    """Of pages on their way to other memory or from it: they lie on the device once more."""
    reserved_bytes: int
    """What a start leaves free for activations, by estimate."""
    activation_bytes: int | None
    """What a step needs beside all else, by the compiler; None where nobody has compiled."""
    page_bytes: int
    page_size: int
    """Tokens of a page."""
    num_pages: int
    """Of the pool that a start would make; page 0 is one more."""

    @property
    def pool_bytes(self) -> int:
        return (self.num_pages + 1) * self.page_bytes

    @property
    def num_tokens(self) -> int:
        """Whose keys and values the pool holds."""
        return self.num_pages * self.page_size

    @property
    def step_bytes(self) -> int:
        """Activations, as well as they are known."""
        return self.reserved_bytes if self.activation_bytes is None else self.activation_bytes

    @property
    def needed_bytes(self) -> int:
        kept_bytes = self.weight_bytes + self.state_bytes + self.pool_bytes
        return kept_bytes + self.moving_bytes + self.step_bytes

    @property
    def free_bytes(self) -> int:
        """Below 0 where there is too little."""
        return self.memory_bytes - self.needed_bytes

    @property
    def short_bytes(self) -> int:
        """How many are missing; 0 where it fits.

        A start may be refused by the estimate before it loads, and by the compiler's figure after.
        """
        planned_bytes = self.needed_bytes - self.step_bytes + self.reserved_bytes
        over = planned_bytes - self.budget_bytes, self.needed_bytes - self.memory_bytes
        return max(0, *over)

    @property
    def most_pages(self) -> int:
        """Of the largest pool that fits; below 1 where none does."""
        activations = max(self.reserved_bytes, self.activation_bytes or 0)
        besides = self.weight_bytes + self.state_bytes + self.moving_bytes + activations
        return (self.budget_bytes - besides) // self.page_bytes - 1


def fit(served: Served, memory_bytes: int) -> Fit:
    """How `served` fits devices of `memory_bytes` each. Raises MeshError.

    A pool of no given size is as large as the memory allows, but no larger than full slots need.
    """
    cache, limits = served.config.cache, served.limits
    share = cache.memory_share(served.platform) if cache.pages is None else 1
    pool = served.pool(1)
    found = Fit(
        memory_bytes=memory_bytes,
        budget_bytes=int(memory_bytes * share),
        weight_bytes=_weight_bytes(served.partition, served.dtype, served.kernels),
        state_bytes=_state_bytes(served),
        moving_bytes=_moving_bytes(served),
        reserved_bytes=estimate_activation_bytes(served),
        activation_bytes=None,
        page_bytes=pool.page_bytes(served.partition),
        page_size=pool.page_size,
        num_pages=cache.pages or 1,
    )
    if cache.pages is not None:
        return found
    useful = limits.max_batch * -(-limits.max_context // pool.page_size)
    return replace(found, num_pages=max(1, min(found.most_pages, useful)))


def num_devices_of(config: ServeConfig) -> int:
    """Devices that the whole of a configuration takes."""
    beside = config.split.prefill_mesh(config.mesh)
    return sum(mesh.data * mesh.stage * mesh.tensor for mesh in (config.mesh, beside) if mesh)


def device_memory_bytes(device: Any, num_devices: int) -> int:
    """What a program may use of `device`; the `num_devices` of a CPU share its memory."""
    stats = device.memory_stats()
    if stats is not None:
        return stats["bytes_limit"]
    return psutil.virtual_memory().total // num_devices


def estimate_activation_bytes(served: Served) -> int:
    """About what the largest step needs beside weights, state and pages.

    docs/performance.md compares it with what the compiler says.
    """
    model, partition = served.model, served.partition
    shape = largest_shapes(served)[-1]
    num_tokens = shape.num_decode + shape.num_chunks * shape.chunk
    widths = [0]
    if not all(layer.experts for layer in model.layers):
        widths.append(model.mlp_size // partition.tensor)
    if experts := partition.fitted.experts:
        # A token goes to as many of a device's experts as it may.
        num_chosen = min(experts.top_k, experts.num_experts // partition.tensor)
        widths.append(num_chosen * experts.size + experts.shared_size // partition.tensor)
    layer = served.dtype.itemsize * (4 * model.hidden_size + 3 * max(widths))
    # Float32 logits and a few copies of them (penalties, sampling), beside the widest layer's.
    return 4 * 6 * shape.num_rows * model.vocab_size + num_tokens * layer


def largest_shapes(served: Served) -> list[StepShape]:
    """Of the steps that are compiled, those that may need most: a full batch in a loop and beside
    the most prefill."""
    shapes = step_shapes(served.limits, served.partition.stages)
    loop = max(shapes, key=lambda shape: (shape.max_tokens, shape.num_decode))
    mixed = max(shapes, key=lambda shape: (shape.num_decode, shape.num_chunks))
    return [loop, mixed]


def _weight_bytes(partition: Partition, dtype: Any, kernels: Kernels) -> int:
    brief = _one_of_each(partition)
    alike = Counter(layer.experts for layer in _of_a_stage(partition))
    _, weights = abstract_weights(brief, dtype, kernels)
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    cuts = jax.tree.leaves(weight_specs(weights), is_leaf=lambda x: isinstance(x, PartitionSpec))
    mesh, total = _mesh_of(partition), 0
    for (path, leaf), cut in zip(leaves, cuts, strict=True):
        held = math.prod(NamedSharding(mesh, cut).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        in_layer = path[0].key == "layers"
        total += held * alike[brief.config.layers[path[1].key].experts] if in_layer else held
    return total


def _state_bytes(served: Served) -> int:
    """All but the pages, which every device holds whole."""
    brief = replace(served, model=_one_of_each(served.partition).config)
    programs = brief.programs(1, _mesh_of(served.partition), XLA)
    slots = replace(programs.abstract_state(), pages=[])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slots))


def _moving_bytes(served: Served) -> int:
    """Of as many pages as move beside a step, as `serve.page_images` cuts them."""
    has_tiers, role = bool(served.config.tiers.host_gib), served.config.split.role
    num_pages = MOST_UNDER_WAY * has_tiers + MOST_SENT * (role == "prefill")
    num_pages += MOST_LANDED * (has_tiers or role == "decode")
    if not num_pages:
        return 0
    partition = served.partition
    images = PageImages(served.programs(1, _mesh_of(partition), XLA))
    num_cuts = 1
    if partition.config.num_layers % partition.stages == 0:
        num_cuts *= partition.stages
    if partition.config.num_kv_heads % partition.tensor == 0:
        num_cuts *= partition.tensor
    return num_pages * images.image_bytes // num_cuts


def _one_of_each(partition: Partition) -> Partition:
    """With one layer of each kind on a stage.

    Those of a kind hold as much, and a start tries many configurations: a model of 126 layers took
    half a second for each.
    """
    kinds = {layer.experts: layer for layer in _of_a_stage(partition)}
    layers = tuple(kinds.values()) * partition.stages
    return replace(partition, config=replace(partition.config, layers=layers))


def _of_a_stage(partition: Partition) -> tuple[Layer, ...]:
    return partition.config.layers[: partition.layers_per_stage]


def _mesh_of(partition: Partition) -> AbstractMesh:
    """Of no devices: arrays can be measured on it."""
    return AbstractMesh((partition.stages, partition.tensor), (STAGE, TENSOR))
