"""Llama 2 and 3, and the tensor names that most families share with it."""

from model.config import Layer, ModelConfig
from model.families.decoder import ACTIVATIONS, Family, equal_layers, read_decoder
from model.families.keys import Keys
from model.families.rope import read_rope
from model.families.tensors import gate_up, linear, qkv, same

TENSORS = {
    "embedding": same("model.embed_tokens.weight"),
    "final_norm": same("model.norm.weight"),
    "head": linear("lm_head.weight"),
    "attention_norm": same("input_layernorm.weight"),
    "attention.qkv": qkv(
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"
    ),
    "attention.qkv_bias": qkv(
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"
    ),
    "attention.out": linear("self_attn.o_proj.weight"),
    "attention.out_bias": same("self_attn.o_proj.bias"),
    "mlp_norm": same("post_attention_layernorm.weight"),
    "mlp.gate_up": gate_up("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.gate_up_bias": gate_up("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.down": linear("mlp.down_proj.weight"),
    "mlp.down_bias": same("mlp.down_proj.bias"),
}


def read(keys: Keys) -> ModelConfig:
    return read_decoder(
        keys,
        equal_layers(keys, Layer(read_rope(keys))),
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
        qkv_bias=keys.flag("attention_bias"),
        out_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
    )


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "mlp_bias": False,
        "num_key_value_heads": None,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
    read=read,
    tensors=TENSORS,
)
