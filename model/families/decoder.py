"""What all families share: the keys of config.json that every decoder has.

It does not know what makes a family different.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import Layer, ModelConfig
from model.families.keys import Keys, UnsupportedModel
from model.families.tensors import Source

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}

DEFAULTS: Mapping[str, Any] = dict.fromkeys(
    ("bos_token_id", "eos_token_id", "quantization_config", "rope_parameters", "rope_scaling")
)
"""Keys that any file may leave out, meaning null."""


@dataclass(frozen=True)
class Family:
    """How one architecture of Hugging Face is read as ours."""

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    """By key of config.json: what transformers assumes where the file says nothing."""
    read: Callable[[Keys], ModelConfig]
    tensors: Mapping[str, Source]
    """By our weight's name, without its layer: the tensors it is made of."""


def read_decoder(keys: Keys, layers: Sequence[Layer], **features: Any) -> ModelConfig:
    """The model that the common keys describe, with what a family adds or sets otherwise."""
    num_heads = keys.size("num_attention_heads")
    head_dim = features.get("head_dim") or keys.optional_size("head_dim")
    head_dim = head_dim or _head_dim(keys, num_heads)
    common: dict[str, Any] = {
        "architecture": keys.architecture,
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": keys.size("hidden_size"),
        "num_heads": num_heads,
        "num_kv_heads": keys.optional_size("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "mlp_size": keys.size("intermediate_size"),
        "layers": tuple(layers),
        "max_context": keys.size("max_position_embeddings"),
        "norm_eps": keys.number("rms_norm_eps"),
        "dtype": keys.choice("dtype", "torch_dtype", options=DTYPES),
        "attention_scale": head_dim**-0.5,
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "bos_id": keys.optional_integer("bos_token_id"),
        "eos_ids": token_ids(keys.any("eos_token_id")),
    }
    try:
        return ModelConfig(**(common | features))
    except ValueError as error:
        raise UnsupportedModel(f"{keys.architecture}: {error}") from error


def equal_layers(keys: Keys, layer: Layer) -> list[Layer]:
    return [layer] * keys.size("num_hidden_layers")


def layer_windows(
    keys: Keys, window: int | None, slides: Callable[[int], bool]
) -> list[int | None]:
    """Each layer's window: where `layer_types` says so, or else where the family's rule does."""
    num_layers = keys.size("num_hidden_layers")
    types = keys.any("layer_types")
    if types is None:
        return [window if slides(i) else None for i in range(num_layers)]
    known = ("full_attention", *(["sliding_attention"] if window else []))
    if len(types) != num_layers or any(kind not in known for kind in types):
        raise keys.refusal("layer_types", f"{' or '.join(known)}, for each of {num_layers} layers")
    return [window if kind == "sliding_attention" else None for kind in types]


def token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids that a file spells as none, one or a list."""
    if value is None:
        return ()
    ids = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(i, int) for i in ids):
        raise UnsupportedModel(f"end-of-sequence ids must be an integer or a list, not {value!r}")
    return ids


def _head_dim(keys: Keys, num_heads: int) -> int:
    hidden_size = keys.size("hidden_size")
    if hidden_size % num_heads:
        raise keys.refusal("hidden_size", f"multiples of num_attention_heads = {num_heads}")
    return hidden_size // num_heads
