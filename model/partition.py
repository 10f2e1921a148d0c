"""How a model is made to divide over a mesh.

A mesh wider than the kv heads serves an equivalent model whose kv heads are repeated; one wider
than the experts, a model whose experts are split by width; the vocabulary is padded; stages that
would be left without a layer get one of zeros, which is the identity. It does not know where
weights come from (`model/loading.py`) or which mesh is wise.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.decoder import Decoder
from model.kernel_choice import XLA, Kernels
from model.kernels.cpu_experts import MOST_APART
from model.weights import QUANTIZED_DTYPES
from sharding.mesh import MeshError, MeshShape
from sharding.rules import weight_spec


@dataclass(frozen=True)
class Partition:
    """A model on stage x tensor devices."""

    config: ModelConfig
    """The model as the checkpoint has it."""
    stages: int
    tensor: int

    def __post_init__(self) -> None:
        if reason := misfit(self.config, self.stages, self.tensor):
            fitting = ", ".join(str(shape) for shape in fitting_meshes(self.config, 8))
            raise MeshError(
                f"mesh stage={self.stages},tensor={self.tensor} does not fit "
                f"{self.config.architecture}: {reason}; up to 8 devices these fit: {fitting}"
            )

    @property
    def num_devices(self) -> int:
        return self.stages * self.tensor

    @property
    def kv_repeat(self) -> int:
        return max(1, self.tensor // self.config.num_kv_heads)

    @property
    def expert_pieces(self) -> int:
        experts = self.config.experts
        return max(1, self.tensor // experts.num_experts) if experts else 1

    @property
    def layers_per_stage(self) -> int:
        return -(-self.config.num_layers // self.stages)

    @property
    def padded_vocab(self) -> int:
        shards = self.num_devices
        return -(-self.config.vocab_size // shards) * shards

    @property
    def fitted(self) -> ModelConfig:
        """The equivalent model that divides."""
        experts = self.config.experts
        if experts:
            pieces = self.expert_pieces
            experts = replace(
                experts, num_experts=experts.num_experts * pieces, size=experts.size // pieces
            )
        heads = self.config.num_kv_heads * self.kv_repeat
        return replace(self.config, num_kv_heads=heads, experts=experts)

    def suited(self, kernels: Kernels) -> Kernels:
        """`kernels` with the one that takes experts apart, where that can be: on one device."""
        experts = self.config.experts
        few = experts is not None and experts.num_experts <= MOST_APART
        if kernels.experts == "cpu" and few and self.num_devices == 1:
            return replace(kernels, experts="cpu_apart")
        return kernels

    def decoder(self, dtype: jnp.dtype, kernels: Kernels) -> Decoder:
        """The module of one stage (under `nnx.eval_shape`: its weights are zeros)."""
        kernels = self.suited(kernels)
        layers = self.config.layers[: self.layers_per_stage]
        num_routed = self.config.experts.num_experts if self.config.experts else 0
        return Decoder(self.fitted, layers, self.padded_vocab, num_routed, dtype, kernels)


def misfit(config: ModelConfig, stages: int, tensor: int) -> str:
    """Why the model doesn't divide over the mesh; empty when it does."""
    heads, kv_heads, experts = config.num_heads, config.num_kv_heads, config.experts
    if heads % tensor:
        return f"{heads} query heads do not divide over tensor={tensor}"
    if kv_heads % tensor and tensor % kv_heads:
        return f"{kv_heads} kv heads neither divide over tensor={tensor} nor divide it"
    if any(not layer.experts for layer in config.layers) and config.mlp_size % tensor:
        return f"feed-forward width {config.mlp_size} does not divide over tensor={tensor}"
    if experts and experts.num_experts % tensor:
        if tensor % experts.num_experts:
            return (
                f"{experts.num_experts} experts neither divide over tensor={tensor} nor divide it"
            )
        if experts.size % (tensor // experts.num_experts):
            pieces = tensor // experts.num_experts
            return f"experts of width {experts.size} do not split into {pieces} for tensor={tensor}"
    if experts and experts.shared_size % tensor:
        return f"shared experts' width {experts.shared_size} does not divide over tensor={tensor}"
    if stages > config.num_layers:
        return f"{config.num_layers} layers are fewer than stage={stages}"
    per_stage = -(-config.num_layers // stages)
    for place in range(per_stage):
        if len({layer.experts for layer in config.layers[place::per_stage]}) > 1:
            return (
                f"with stage={stages}, layers {place}, {place + per_stage}, ... share a program "
                "but some are dense and some have experts"
            )
    return ""


def fitting_meshes(config: ModelConfig, num_devices: int) -> list[MeshShape]:
    """Every stage x tensor mesh, in powers of two, that the model divides over."""
    sizes = [2**i for i in range(num_devices.bit_length())]
    return [
        MeshShape(stage=stage, tensor=tensor)
        for stage in sizes
        for tensor in sizes
        if stage * tensor <= num_devices and not misfit(config, stage, tensor)
    ]


def abstract_weights(
    partition: Partition, dtype: jnp.dtype, kernels: Kernels = XLA
) -> tuple[Any, Any]:
    """The decoder's graph, and its weights as shapes: layers stacked over stages in front.

    Where products are a CPU's, fp8 weights are in `dtype`, which holds the same numbers.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: partition.decoder(dtype, kernels)))

    def stack(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        stages = (partition.stages,) if weight_name(path).startswith("layers.") else ()
        # XLA on CPU would turn them into floats in memory at each product.
        widened = kernels.small_matmul == "cpu" and leaf.dtype == QUANTIZED_DTYPES["fp8"]
        return jax.ShapeDtypeStruct((*stages, *leaf.shape), dtype if widened else leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(stack, state)


def weight_specs(weights: Any) -> Any:
    """The tree of PartitionSpecs of a tree of weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: weight_spec(weight_name(path)), weights)


def weight_name(path: Any) -> str:
    """A weight's name as in `model/weights.py`, from its place in the module's state."""
    keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    return ".".join(str(key) for key in keys if key not in ("value", None))
