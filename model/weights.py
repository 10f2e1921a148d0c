"""Names and shapes of a decoder's weights in Weft's layout, and what each is made of.

The layout is the same for every family and every mesh; `sharding/rules.py` says how each is cut.
It does not read files (`model/checkpoint`) and names no family (`model/families`).

| name                               | shape            | notes                               |
|------------------------------------|------------------|-------------------------------------|
| embedding                          | [V, D]           |                                     |
| head                               | [D, V]           | absent when embeddings are tied     |
| final_norm                         | [D]              |                                     |
| layers.I.attention.qkv             | [D, K, G + 2, C] | by kv head: its G query heads, k, v;|
|                                    |                  | absent with latent                  |
| layers.I.attention.qkv_bias        | [K, G + 2, C]    | with qkv_bias                       |
| layers.I.attention.q               | [D, K, C]        | latent, without a q_rank            |
| layers.I.attention.q_down          | [D, q_rank]      | latent                              |
| layers.I.attention.q_latent_norm   | [q_rank]         | latent                              |
| layers.I.attention.q_up            | [q_rank, K, C]   | latent; C is nope_dim + rope_dim    |
| layers.I.attention.kv_down         | [D, kv_rank + rope_dim] | latent; then the shared key  |
| layers.I.attention.kv_latent_norm  | [kv_rank]        | latent                              |
| layers.I.attention.kv_up           | [kv_rank, K, nope_dim + U] | latent                    |
| layers.I.attention.q_norm          | [C]              | qk_norm "head"                      |
| layers.I.attention.k_norm          | [C]              | qk_norm "head"                      |
| layers.I.attention.q_norm_all      | [K, G, C]        | qk_norm "all"                       |
| layers.I.attention.k_norm_all      | [K, C]           | qk_norm "all"                       |
| layers.I.attention.sinks           | [K, G]           | with sinks                          |
| layers.I.attention.out             | [K, G, U, D]     | U is C but with latent              |
| layers.I.attention.out_bias        | [D]              | with out_bias                       |
| layers.I.mlp.gate_up               | [D, 2, F]        | dense layers                        |
| layers.I.mlp.gate_up_bias          | [2, F]           | with mlp_bias                       |
| layers.I.mlp.down                  | [F, D]           | dense layers                        |
| layers.I.mlp.down_bias             | [D]              | with mlp_bias                       |
| layers.I.moe.router                | [D, E]           | expert layers                       |
| layers.I.moe.router_bias           | [E]              | with experts.bias                   |
| layers.I.moe.gate_up               | [E, D, 2, F]     | expert layers; F is experts.size    |
| layers.I.moe.gate_up_bias          | [E, 2, F]        | with experts.bias                   |
| layers.I.moe.down                  | [E, F, D]        | expert layers                       |
| layers.I.moe.down_bias             | [E, D]           | with experts.bias                   |
| layers.I.moe.selection_bias        | [E]              | with experts.selection_bias         |
| layers.I.moe.shared_gate_up        | [D, 2, F]        | F is experts.shared_size            |
| layers.I.moe.shared_down           | [F, D]           | F is experts.shared_size            |
| layers.I.attention_norm, .mlp_norm | [D]              | norm_placement "pre" or "both"      |
| layers.I.attention_post_norm, .mlp_post_norm | [D]    | norm_placement "post" or "both"     |

Of a quantized model the weights in SUMMED hold int8 or float8_e4m3fn, and each has a float32 weight
beside it, NAME_scale, of its shape without the axes that the product sums over: what an output
channel is to be multiplied by.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from model.config import Latent, Layer, ModelConfig, Quantization

Shape = tuple[int, ...]
Pack = Callable[[Sequence[np.ndarray]], np.ndarray]
Unpack = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Weight:
    """One weight of ours and the family's tensors that hold the same numbers.

    `parts` lists the family's tensor names. With one part, `pack` makes the whole weight of it;
    with several (experts), `pack` makes one slice `weight[i]` of `parts[i]`, so that a reader or
    writer never needs more than one slice in memory. `unpack` is the exact inverse of `pack`.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, ...], ...]
    pack: Pack
    unpack: Unpack


def stays_float32(name: str) -> bool:
    """Whether a weight is kept as it is, whatever dtype the others are served or converted in.

    A selection bias is; rounding it would choose other experts.
    """
    return name.endswith(".moe.selection_bias")


SUMMED: dict[str, tuple[int, ...]] = {
    "attention.qkv": (0,),
    "attention.q": (0,),
    "attention.q_down": (0,),
    "attention.q_up": (0,),
    "attention.kv_down": (0,),
    "attention.kv_up": (0,),
    "attention.out": (0, 1, 2),
    "mlp.gate_up": (0,),
    "mlp.down": (0,),
    "moe.gate_up": (1,),
    "moe.down": (1,),
    "moe.shared_gate_up": (0,),
    "moe.shared_down": (0,),
}
"""By a weight's name without its layer, the axes that its product sums over, of those that may be
quantized: not a router, whose last bit may decide between two experts, and neither embedding nor
head, on which the quality depends most (docs/performance.md)."""

QUANTIZED_DTYPES: dict[Quantization, np.dtype] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}


def summed_axes(name: str) -> tuple[int, ...]:
    """Those of weight `name`, its layer included or not; empty where it is never quantized."""
    return SUMMED.get(re.sub(r"^layers\.\d+\.", "", name), ())


def scale_shape(name: str, shape: Shape) -> Shape:
    """The shape of the scale of weight `name`."""
    return tuple(size for axis, size in enumerate(shape) if axis not in summed_axes(name))


def quantized(config: ModelConfig) -> dict[str, Shape]:
    """The weights that a quantized form of the model has scales for."""
    return {name: shape for name, shape in _plain_shapes(config).items() if summed_axes(name)}


def shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every weight of a model, in the order in which a forward pass meets them."""
    plain = _plain_shapes(config)
    if config.quantization is None:
        return plain
    with_scales = quantized(config)
    found: dict[str, Shape] = {}
    for name, shape in plain.items():
        found[name] = shape
        if name in with_scales:
            found[f"{name}_scale"] = scale_shape(name, shape)
    return found


def _plain_shapes(config: ModelConfig) -> dict[str, Shape]:
    D, V = config.hidden_size, config.vocab_size
    found: dict[str, Shape] = {"embedding": (V, D)}
    for i, layer in enumerate(config.layers):
        found |= {f"layers.{i}.{name}": shape for name, shape in _layer(config, layer).items()}
    found["final_norm"] = (D,)
    if not config.tie_embeddings:
        found["head"] = (D, V)
    return found


def _layer(config: ModelConfig, layer: Layer) -> dict[str, Shape]:
    block = _experts(config) if layer.experts else _mlp(config)
    norm = (config.hidden_size,)
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    return (
        ({"attention_norm": norm} if before else {})
        | _attention(config)
        | ({"attention_post_norm": norm} if after else {})
        | ({"mlp_norm": norm} if before else {})
        | block
        | ({"mlp_post_norm": norm} if after else {})
    )


def _attention(config: ModelConfig) -> dict[str, Shape]:
    D, K, G, U = config.hidden_size, config.num_kv_heads, config.group_size, config.value_dim
    found = _latent(config, config.latent) if config.latent else _qkv(config)
    if config.sinks:
        found["attention.sinks"] = (K, G)
    found["attention.out"] = (K, G, U, D)
    if config.out_bias:
        found["attention.out_bias"] = (D,)
    return found


def _qkv(config: ModelConfig) -> dict[str, Shape]:
    D, K, G, C = config.hidden_size, config.num_kv_heads, config.group_size, config.head_dim
    found: dict[str, Shape] = {"attention.qkv": (D, K, G + 2, C)}
    if config.qkv_bias:
        found["attention.qkv_bias"] = (K, G + 2, C)
    if config.qk_norm == "head":
        found |= {"attention.q_norm": (C,), "attention.k_norm": (C,)}
    if config.qk_norm == "all":
        found |= {"attention.q_norm_all": (K, G, C), "attention.k_norm_all": (K, C)}
    return found


def _latent(config: ModelConfig, latent: Latent) -> dict[str, Shape]:
    D, K, C = config.hidden_size, config.num_kv_heads, config.head_dim
    queries: dict[str, Shape] = {"attention.q": (D, K, C)}
    if latent.q_rank:
        queries = {
            "attention.q_down": (D, latent.q_rank),
            "attention.q_latent_norm": (latent.q_rank,),
            "attention.q_up": (latent.q_rank, K, C),
        }
    return queries | {
        "attention.kv_down": (D, latent.kv_rank + latent.rope_dim),
        "attention.kv_latent_norm": (latent.kv_rank,),
        "attention.kv_up": (latent.kv_rank, K, latent.nope_dim + latent.value_dim),
    }


def _mlp(config: ModelConfig) -> dict[str, Shape]:
    D, F = config.hidden_size, config.mlp_size
    found: dict[str, Shape] = {"mlp.gate_up": (D, 2, F), "mlp.down": (F, D)}
    if config.mlp_bias:
        found |= {"mlp.gate_up_bias": (2, F), "mlp.down_bias": (D,)}
    return found


def _experts(config: ModelConfig) -> dict[str, Shape]:
    assert config.experts is not None  # ModelConfig refuses expert layers without
    D, E, F = config.hidden_size, config.experts.num_experts, config.experts.size
    found: dict[str, Shape] = {
        "moe.router": (D, E),
        "moe.gate_up": (E, D, 2, F),
        "moe.down": (E, F, D),
    }
    if config.experts.bias:
        found |= {
            "moe.router_bias": (E,),
            "moe.gate_up_bias": (E, 2, F),
            "moe.down_bias": (E, D),
        }
    if config.experts.selection_bias:
        found["moe.selection_bias"] = (E,)
    if shared := config.experts.shared_size:
        found |= {"moe.shared_gate_up": (D, 2, shared), "moe.shared_down": (shared, D)}
    return found
