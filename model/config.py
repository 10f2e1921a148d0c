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
    """Rotary position embedding, half-split pairs, over the last `rope_dim` channels of a head."""

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


Quantization = Literal["int8", "fp8"]
"""int8, or float8_e4m3fn; both with a scale for each output channel."""


@dataclass(frozen=True)
class Experts:
    """A mixture of `num_experts` feed-forward blocks of width `size`, `top_k` of them per token."""

    num_experts: int
    top_k: int
    size: int
    normalize: bool
    """Scale the chosen experts' weights to sum to one."""
    bias: bool = False
    """On the router and on every expert's gate, up and down."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """What makes weights of the router's logits."""
    selection_bias: bool = False
    """A learned number for each expert joins its weight where experts are chosen, only there."""
    num_groups: int = 1
    top_groups: int = 1
    """Experts stand in equal groups; only those of a token's best `top_groups` may be chosen, the
    best by the sum of a group's two best experts."""
    scale: float = 1.0
    """Factor on the chosen experts' weights."""
    shared_size: int = 0
    """Width of a block beside the experts, that every token passes."""


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1).

    Queries come up from `q_rank` numbers for each token (None: from x itself), keys and values from
    `kv_rank`. A head's key is `nope_dim` channels of its own, then `rope_dim` rotated ones that all
    heads share.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float
    """Of the norms of both latents; a model's other norms may have another."""


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
    latent: Latent | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    quantization: Quantization | None = None
    """How the numbers of products' weights are stored (`model/weights.py`); None: as all others."""

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
            self.rope_dim % 2 == 0,
            f"{'rope_dim' if self.latent else 'head_dim'} is {self.rope_dim}; rotary embedding "
            "needs pairs of channels",
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
            _require_groups(experts)
        if self.latent is not None:
            _require_latent(self, self.latent)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rope_dim(self) -> int:
        """Channels of a head that are rotated, its last."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Channels of a head's value."""
        return self.latent.value_dim if self.latent else self.head_dim


def _require_groups(experts: Experts) -> None:
    if experts.num_groups == 1 and experts.top_groups == 1:
        return
    groups, chosen = experts.num_groups, experts.top_groups
    size = experts.num_experts // groups
    _require(
        experts.num_experts % groups == 0 and size >= 2,
        f"{experts.num_experts} experts stand in {groups} groups; "
        "groups must be equal, of two experts or more",
    )
    _require(
        0 < chosen <= groups and experts.top_k <= chosen * size,
        f"each token chooses {experts.top_k} experts of {chosen} of {groups} groups of {size}; "
        "the chosen groups must hold as many",
    )


def _require_latent(config: ModelConfig, latent: Latent) -> None:
    _require(
        config.head_dim == latent.nope_dim + latent.rope_dim,
        f"head_dim is {config.head_dim}; latent attention's is its nope_dim {latent.nope_dim} and "
        f"rope_dim {latent.rope_dim} together",
    )
    _require(
        config.num_kv_heads == config.num_heads,
        f"num_kv_heads is {config.num_kv_heads}; latent attention has one for each of its "
        f"{config.num_heads} query heads",
    )
    _require(
        not config.qkv_bias and config.qk_norm == "none",
        "latent attention has neither qkv_bias nor qk_norm; its norms are on the latents",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
