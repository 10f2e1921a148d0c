"""A model's products' weights rounded to 8 bits, knowing from given tokens what they multiply.

The model runs layer by layer, as it is and as it is rounded so far; each weight is rounded so that
the second comes near to the first (`model/checkpoint/gptq.py`). It does not know where the tokens
come from or where the weights go.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from model.attention import Tokens
from model.checkpoint.gptq import Moments, round_for
from model.checkpoint.source import CheckpointError, Index
from model.config import Layer, ModelConfig, Quantization, Rope
from model.inputs import Input, noted_inputs
from model.loading import Source, stream_weights
from model.mlp import activate
from model.pages import empty_pages
from model.partition import Partition, abstract_weights
from model.weights import quantized, summed_axes
from sharding.mesh import MeshShape, make_meshes

BATCH = 4096
"""Tokens run at once: enough for products of full speed, few enough for their hidden numbers."""

FLOAT32 = jnp.dtype("float32")
LAYER = "layers.0."
"""Where the weights of a model of one layer are."""
ANY_ROPE = Rope(theta=1.0)
"""Layers' rotation and window come with their weights, and their program is one."""

Ran = tuple[list[Input], jax.Array]
"""A layer's inputs of products, in their order, and what comes out of it."""


@dataclass(frozen=True)
class Rounded:
    """A weight's numbers, and what its output channels are multiplied by."""

    name: str
    numbers: np.ndarray
    scales: np.ndarray


class Calibrated:
    """The weights of `quantized(config)`, to be asked for in its order; each is rounded then.

    `token_ids_RT` are sequences of one length. In memory are a layer in float32, its rounded form,
    what both make of these, and what rounding one weight takes. An expert's weights are rounded for
    the tokens that are routed to it; without any, to nearest. The same arguments give the same
    numbers.
    Raises CheckpointError: at once for tokens that can't be, later as `round_for`.
    """

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        quantization: Quantization,
        token_ids_RT: np.ndarray,
    ) -> None:
        _check_tokens(config, token_ids_RT)
        self._weights = _round_layers(source, config, quantization, token_ids_RT)
        self._last: Rounded | None = None

    def __call__(self, name: str, rows: Index) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scales of rows of a weight."""
        if self._last is None or self._last.name != name:
            self._last = next(self._weights)
            assert self._last.name == name, "weights are asked for in their order"
        return self._last.numbers[rows], self._last.scales[rows]


def _check_tokens(config: ModelConfig, token_ids_RT: np.ndarray) -> None:
    if not token_ids_RT.size:
        raise CheckpointError("there are no tokens to calibrate on; give a sequence or more")
    unknown = token_ids_RT[(token_ids_RT < 0) | (token_ids_RT >= config.vocab_size)]
    if unknown.size:
        raise CheckpointError(
            f"among the tokens to calibrate on is {unknown[0]}, and the vocabulary is 0 to "
            f"{config.vocab_size - 1}; give tokens of this model"
        )


def _round_layers(
    source: Source, config: ModelConfig, quantization: Quantization, token_ids_RT: np.ndarray
) -> Iterator[Rounded]:
    original_RTD = source.read("embedding", ())[token_ids_RT].astype(np.float32)
    original_RTD *= np.float32(config.embedding_scale)
    rounded_RTD = original_RTD
    for index in range(config.num_layers):
        layer = _Layer(source, config, index, quantization, original_RTD, rounded_RTD)
        yield from layer.round()
        original_RTD, rounded_RTD = layer.outputs()


class _Layer:
    """One layer, its weights rounded one after the other."""

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        index: int,
        quantization: Quantization,
        original_RTD: np.ndarray,
        rounded_RTD: np.ndarray,
    ) -> None:
        # By itself, and of one token: nothing else of the model is read.
        self.config = replace(
            config, layers=(config.layers[index],), vocab_size=1, tie_embeddings=True
        )
        self.quantization: Quantization = quantization
        self.prefix = f"layers.{index}."
        self.weights = _read(self.config, _OneLayer(source, self.prefix))
        self.rounded = dict(self.weights)
        self.original = list(self._run(self.weights, original_RTD))
        self.rounded_RTD = rounded_RTD

    def round(self) -> Iterator[Rounded]:
        """The weights of products, in the order in which inputs meet them."""
        names = [name.removeprefix(LAYER) for name in quantized(self.config)]
        products = [name for name in names if name != "moe.down"]  # goes with moe.gate_up
        for place, name in enumerate(products):
            if name == "moe.gate_up":
                yield from self._round_experts(place)
            else:
                yield self._round_product(name, place)

    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """What the layer makes of its inputs, by its own weights and by the rounded ones."""
        both = self.original, self._run(self.rounded, self.rounded_RTD)
        original, rounded = (np.concatenate([out for _, out in batches]) for batches in both)
        return original, rounded

    def _round_product(self, name: str, place: int) -> Rounded:
        pairs = ((here.x_ND, original.x_ND) for here, original in self._inputs(place))
        weight = np.asarray(self.weights[LAYER + name])
        return self._keep(name, *self._fitted(name, weight, Moments.of(pairs)))

    def _round_experts(self, place: int) -> Iterator[Rounded]:
        """gate_up and down, each expert's for the tokens that the rounded model routes to it."""
        batches = list(self._inputs(place))
        x_ND = np.concatenate([here.x_ND for here, _ in batches])
        original_ND = np.concatenate([original.x_ND for _, original in batches])
        routed_EN = np.concatenate([np.asarray(here.routed_EN) for here, _ in batches], axis=1)
        numbers: dict[str, list[np.ndarray]] = {"moe.gate_up": [], "moe.down": []}
        scales: dict[str, list[np.ndarray]] = {"moe.gate_up": [], "moe.down": []}
        for expert, routed_N in enumerate(routed_EN):
            here, original = (x[np.flatnonzero(routed_N)] for x in (x_ND, original_ND))
            for name in numbers:
                weight = np.asarray(self.weights[LAYER + name][expert])
                rounded = self._fitted(name, weight, Moments.of([(here, original)]), expert)
                numbers[name].append(rounded[0])
                scales[name].append(rounded[1])
                if name == "moe.gate_up":  # down is multiplied with what this makes
                    original = self._hidden(expert, original, weight)
                    here = self._hidden(expert, here, rounded[0].astype(np.float32) * rounded[1])
        for name in numbers:
            yield self._keep(name, np.stack(numbers[name]), np.stack(scales[name]))

    def _fitted(
        self, name: str, weight: np.ndarray, inputs: Moments, expert: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The numbers and scales of a weight, or of one expert's, whose first axes are summed."""
        kept = weight.shape[len(summed_axes(name)) :]
        whose = f"{self.prefix}{name}" + ("" if expert is None else f" of expert {expert}")
        numbers_IO, scales_O = round_for(
            weight.reshape(-1, math.prod(kept)), inputs, self.quantization, whose
        )
        return numbers_IO.reshape(weight.shape), scales_O.reshape(kept)

    def _hidden(self, expert: int, x_ND: np.ndarray, gate_up_D2F: np.ndarray) -> np.ndarray:
        bias_E2F = self.weights.get(f"{LAYER}moe.gate_up_bias")
        bias_2F = None if bias_E2F is None else bias_E2F[expert]
        # Powers of two, so that few programs are compiled for any number of tokens.
        rows = 1 << max(len(x_ND) - 1, 0).bit_length()
        padded_ND = np.pad(x_ND, ((0, rows - len(x_ND)), (0, 0)))
        with jax.default_device(jax.devices("cpu")[0]):
            hidden_ND = _hidden(padded_ND, gate_up_D2F, bias_2F, config=self.config)
        return np.asarray(hidden_ND)[: len(x_ND)]

    def _keep(self, name: str, numbers: np.ndarray, scales: np.ndarray) -> Rounded:
        """What the layer computes with from here on."""
        wide = np.expand_dims(scales, summed_axes(name))
        meant = numbers.astype(np.float32) * wide
        self.rounded[LAYER + name] = jax.device_put(meant, self.weights[LAYER + name].sharding)
        return Rounded(self.prefix + name, numbers, scales)

    def _inputs(self, place: int) -> Iterator[tuple[Input, Input]]:
        """What product `place` is given as the layer is rounded so far, and in the original."""
        rounded = self._run(self.rounded, self.rounded_RTD)
        for (here, _), (original, _) in zip(rounded, self.original, strict=True):
            yield here[place], original[place]

    def _run(self, weights: Mapping[str, jax.Array], x_RTD: np.ndarray) -> Iterator[Ran]:
        """What `_program` gives for some sequences at a time."""
        (layer,) = self.config.layers
        run = _program(replace(self.config, layers=(Layer(ANY_ROPE, experts=layer.experts),)))
        step = max(1, BATCH // x_RTD.shape[1])
        for start in range(0, len(x_RTD), step):
            yield run(list(weights.values()), x_RTD[start : start + step])


@dataclass(frozen=True)
class _OneLayer:
    """A checkpoint as that of a model of one layer."""

    source: Source
    prefix: str

    def read(self, name: str, index: Index) -> np.ndarray:
        return self.source.read(name.replace(LAYER, self.prefix, 1), index)


def _read(config: ModelConfig, source: _OneLayer) -> dict[str, jax.Array]:
    """The weights of a model of one layer, in the order of its decoder's."""
    partition = Partition(config, 1, 1)
    _, abstract = abstract_weights(partition, FLOAT32)
    (mesh,) = make_meshes(MeshShape(), jax.devices("cpu"))
    return {
        name: leaf[0] if name.startswith(LAYER) else leaf  # of the first stage, the only one
        for name, leaf in stream_weights(partition, source, mesh, abstract)
    }


@cache
def _program(config: ModelConfig) -> Callable[[list[jax.Array], np.ndarray], Ran]:
    """A model of one layer, run over sequences that each begin anew."""
    partition = Partition(config, 1, 1)
    graph, abstract = abstract_weights(partition, FLOAT32)
    tree = jax.tree.structure(abstract)
    (mesh,) = make_meshes(MeshShape(), jax.devices("cpu"))
    everywhere = PartitionSpec()

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    def run(weights: list[jax.Array], x_RTD: jax.Array) -> Ran:
        R, T, D = x_RTD.shape
        # Each sequence has a page; page 0 is nobody's.
        page_R = 1 + jnp.arange(R)
        heads = (1 + R, T, config.num_kv_heads)
        pages = empty_pages((*heads, config.head_dim), (*heads, config.value_dim), FLOAT32)
        tokens = Tokens(
            positions_N=jnp.tile(jnp.arange(T), R),
            page_N=jnp.repeat(page_R, T),
            tables_RW=page_R[:, None],
            starts_R=jnp.zeros(R, jnp.int32),
            lengths_R=jnp.full(R, T, jnp.int32),
            num_decode=0,
            chunk=T,
        )
        decoder = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        with noted_inputs() as inputs:
            out_ND, _ = decoder.run(x_RTD.reshape(R * T, D), [pages], tokens)
        return inputs, out_ND.reshape(R, T, D)

    return run


@partial(jax.jit, static_argnames="config")
def _hidden(
    x_ND: jax.Array, gate_up_D2F: jax.Array, bias_2F: jax.Array | None, *, config: ModelConfig
) -> jax.Array:
    gate_up_N2F = jnp.einsum("nd,dpf->npf", x_ND, gate_up_D2F, precision="highest")
    return activate(gate_up_N2F if bias_2F is None else gate_up_N2F + bias_2F, config)
