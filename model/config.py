"""The one frozen description of a decoder that every Hugging Face family is mapped onto.

It does not know families' spellings (`model/families`) or devices (`sharding`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearScaling:
    """RoPE frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's RoPE scaling: low frequencies divided by `factor`, a smooth band between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): interpolation by frequency.

    `attention_factor` scales cos and sin; `truncate` rounds the band's ends to whole channels.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    attention_factor: float
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split pairs, over all channels of a head."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True)
class Layer:
    """What may differ from one layer to the next."""

    rope: Rope
    window: int | None = None
    """Tokens a query sees, itself included; None: all before it."""
    experts: bool = False


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss's activation: gate' * sigmoid(alpha * gate') * (up' + 1).

    gate' is gate clamped from above to `limit`, up' is up clamped to +-`limit`.
    """

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """A mixture of `num_experts` feed-forward blocks of width `size`, `top_k` of them per token."""

    num_experts: int
    top_k: int
    size: int
    normalize: bool
    """Scale the chosen experts' softmax weights to sum to one."""
    bias: bool = False
    """On the router and on every expert's gate, up and down."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a decoder's arithmetic and its weights' shapes."""

    architecture: str
    """The name in config.json, such as LlamaForCausalLM."""
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    """Width of a dense feed-forward block."""
    layers: tuple[Layer, ...]
    max_context: int
    norm_eps: float
    dtype: str
    """The dtype the checkpoint's weights are stored in."""
    attention_scale: float
    """Factor on q.k before the softmax."""
    activation: Literal["silu", "gelu_tanh"] | ClampedSwiglu = "silu"
    """A block computes activation(gate) * up, unless it is a ClampedSwiglu, which takes both."""
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    """On gate, up and down of dense blocks; experts say so themselves."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMS norm of q and k before RoPE: over each head's channels, or over all heads at once."""
    norm_offset: float = 0.0
    """Added to every norm's weight (Gemma stores weight - 1)."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Norms before each block, after it (before the residual add), or both."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    sinks: bool = False
    """One learned logit per head that joins the softmax and carries no value."""
    experts: Experts | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            _require(
                getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive"
            )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; "
            "every kv head must serve the same number of query heads",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; rotary embedding needs pairs of channels",
        )
        _require(bool(self.layers), "there are no layers")
        for i, layer in enumerate(self.layers):
            window = layer.window
            _require(
                window is None or window > 0,
                f"layer {i} has window {window}; a query must see at least itself",
            )
            _require(
                not layer.experts or self.experts is not None,
                f"layer {i} has experts, but the configuration describes none",
            )
        if (experts := self.experts) is not None:
            _require(
                0 < experts.top_k <= experts.num_experts,
                f"each token chooses {experts.top_k} of {experts.num_experts} experts; "
                f"it must be between 1 and {experts.num_experts}",
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
