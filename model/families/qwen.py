"""Qwen2 and 2.5 (biases on q, k and v), Qwen3 (norms on q and k), Qwen3-MoE (and experts)."""

from model.config import Experts, Layer, ModelConfig
from model.families import llama
from model.families.decoder import ACTIVATIONS, Family, layer_windows, read_decoder
from model.families.keys import Keys
from model.families.rope import read_rope
from model.families.tensors import gate_up, linear, same


def read_qwen2(keys: Keys) -> ModelConfig:
    return read_decoder(
        keys,
        _layers(keys),
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
        qkv_bias=True,
    )


def read_qwen3(keys: Keys) -> ModelConfig:
    return read_decoder(
        keys,
        _layers(keys),
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
        qkv_bias=keys.flag("attention_bias"),
        out_bias=keys.flag("attention_bias"),
        qk_norm="head",
    )


def read_qwen3_moe(keys: Keys) -> ModelConfig:
    # Releases of transformers disagree about which layers a window would be for.
    if keys.flag("use_sliding_window"):
        raise keys.refusal("use_sliding_window", "false")
    keys.skip("sliding_window", "max_window_layers")
    rope = read_rope(keys)
    dense, step = keys.any("mlp_only_layers") or [], keys.size("decoder_sparse_step")
    layers = [
        Layer(rope, experts=i not in dense and (i + 1) % step == 0)
        for i in range(keys.size("num_hidden_layers"))
    ]
    experts = Experts(
        num_experts=keys.size("num_experts", "num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        size=keys.size("moe_intermediate_size"),
        normalize=keys.flag("norm_topk_prob"),
    )
    return read_decoder(
        keys,
        layers,
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
        qkv_bias=keys.flag("attention_bias"),
        out_bias=keys.flag("attention_bias"),
        qk_norm="head",
        experts=experts,
    )


def _layers(keys: Keys) -> list[Layer]:
    """The last layers slide, if any do."""
    rope = read_rope(keys)
    written = keys.optional_size("sliding_window")
    window = written if keys.flag("use_sliding_window") else None
    first = keys.integer("max_window_layers")
    return [Layer(rope, window) for window in layer_windows(keys, window, lambda i: i >= first)]


DEFAULTS = {
    "layer_types": None,
    "max_window_layers": 28,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}

QK_NORM_TENSORS = llama.TENSORS | {
    "attention.q_norm": same("self_attn.q_norm.weight"),
    "attention.k_norm": same("self_attn.k_norm.weight"),
}

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults=DEFAULTS | {"head_dim": None},
    read=read_qwen2,
    tensors=llama.TENSORS,
)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults=DEFAULTS | {"attention_bias": False},
    read=read_qwen3,
    tensors=QK_NORM_TENSORS,
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    defaults={
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    read=read_qwen3_moe,
    tensors=QK_NORM_TENSORS
    | {
        "moe.router": linear("mlp.gate.weight"),
        "moe.gate_up": gate_up(
            "mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"
        ),
        "moe.down": linear("mlp.experts.{expert}.down_proj.weight"),
    },
)
