"""gpt-oss: attention sinks, windows in every other layer, experts with biases and a clamp."""

from model.config import ClampedSwiglu, Experts, Layer, ModelConfig
from model.families import llama
from model.families.decoder import Family, layer_windows, read_decoder
from model.families.keys import Keys
from model.families.rope import read_rope
from model.families.tensors import flat, interleaved_gate_up, linear, same


def read(keys: Keys) -> ModelConfig:
    rope = read_rope(keys)
    windows = layer_windows(keys, keys.size("sliding_window"), lambda i: i % 2 == 0)
    keys.skip("initial_context_length")  # the rope's original context once more
    clamped = ClampedSwiglu(keys.number("swiglu_alpha"), keys.number("swiglu_limit"))
    experts = Experts(
        num_experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok", "experts_per_token"),
        size=keys.size("intermediate_size"),
        normalize=True,
        bias=True,
    )
    return read_decoder(
        keys,
        [Layer(rope, window, experts=True) for window in windows],
        activation=keys.choice("hidden_act", options={"silu": clamped}),
        experts=experts,
        qkv_bias=keys.flag("attention_bias"),
        out_bias=keys.flag("attention_bias"),
        sinks=True,
    )


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    defaults={
        "attention_bias": True,
        "layer_types": None,
        "rope_theta": 150_000.0,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    },
    read=read,
    tensors=llama.TENSORS
    | {
        "attention.sinks": flat("self_attn.sinks"),
        "moe.router": linear("mlp.router.weight"),
        "moe.router_bias": same("mlp.router.bias"),
        "moe.gate_up": interleaved_gate_up("mlp.experts.gate_up_proj"),
        "moe.gate_up_bias": interleaved_gate_up("mlp.experts.gate_up_proj_bias"),
        "moe.down": same("mlp.experts.down_proj"),
        "moe.down_bias": same("mlp.experts.down_proj_bias"),
    },
)
