"""Gemma 2 and the text models of Gemma 3: norms around each block, windows in most layers."""

from model.config import Layer, ModelConfig, Rope
from model.families import llama
from model.families.decoder import ACTIVATIONS, Family, layer_windows, read_decoder
from model.families.keys import Keys
from model.families.rope import parse_rope, read_rope
from model.families.tensors import same


def read_gemma2(keys: Keys) -> ModelConfig:
    rope = read_rope(keys)
    window = keys.size("sliding_window", "sliding_window_size")
    windows = layer_windows(keys, window, lambda i: i % 2 == 0)
    return _read(
        keys,
        [Layer(rope, window) for window in windows],
        attention_softcap=keys.optional_number("attn_logit_softcapping"),
    )


def read_gemma3(keys: Keys) -> ModelConfig:
    full, sliding = _ropes(keys)
    pattern = keys.size("sliding_window_pattern")
    windows = layer_windows(keys, keys.size("sliding_window"), lambda i: (i + 1) % pattern != 0)
    layers = [Layer(sliding if window else full, window) for window in windows]
    return _read(keys, layers, qk_norm="head")


def _read(keys: Keys, layers: list[Layer], **features) -> ModelConfig:
    return read_decoder(
        keys,
        layers,
        activation=keys.choice("hidden_activation", "hidden_act", options=ACTIVATIONS),
        attention_scale=keys.number("query_pre_attn_scalar") ** -0.5,
        embedding_scale=keys.size("hidden_size") ** 0.5,
        logit_softcap=keys.optional_number("final_logit_softcapping"),
        norm_offset=1.0,
        norm_placement="both",
        qkv_bias=keys.flag("attention_bias"),
        out_bias=keys.flag("attention_bias"),
        **features,
    )


def _ropes(keys: Keys) -> tuple[Rope, Rope]:
    """The rotary embeddings of full and of sliding layers."""
    by_type = keys.mapping("rope_parameters")
    if not by_type:
        local = {"rope_theta": keys.number("rope_local_base_freq")}
        return read_rope(keys), parse_rope(keys, local, "rope_local_base_freq")
    kinds = ("full_attention", "sliding_attention")
    if set(by_type) != set(kinds):
        raise keys.refusal("rope_parameters", f"an object with {' and '.join(kinds)}")
    full, sliding = (parse_rope(keys, by_type[kind], f"rope_parameters.{kind}") for kind in kinds)
    return full, sliding


DEFAULTS = {
    "attention_bias": False,
    "layer_types": None,
    "tie_word_embeddings": True,
}

NORM_TENSORS = {
    "attention_norm": same("input_layernorm.weight"),
    "attention_post_norm": same("post_attention_layernorm.weight"),
    "mlp_norm": same("pre_feedforward_layernorm.weight"),
    "mlp_post_norm": same("post_feedforward_layernorm.weight"),
}

GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    defaults=DEFAULTS | {"rope_theta": 10_000.0},
    read=read_gemma2,
    tensors=llama.TENSORS | NORM_TENSORS,
)

GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    defaults=DEFAULTS
    | {
        "final_logit_softcapping": None,
        "rope_local_base_freq": 10_000.0,
        "rope_theta": 1_000_000.0,
        "sliding_window_pattern": 6,
    },
    read=read_gemma3,
    tensors=llama.TENSORS
    | NORM_TENSORS
    | {
        "attention.q_norm": same("self_attn.q_norm.weight"),
        "attention.k_norm": same("self_attn.k_norm.weight"),
    },
)
