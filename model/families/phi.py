"""Phi-3: Mistral with its linear layers fused; without longrope, which its long variants use."""

from model.config import Layer, ModelConfig
from model.families import llama
from model.families.decoder import ACTIVATIONS, Family, equal_layers, read_decoder
from model.families.keys import Keys
from model.families.rope import read_rope
from model.families.tensors import fused_gate_up, fused_qkv


def read(keys: Keys) -> ModelConfig:
    # transformers takes any other type for longrope, and only longrope has an original context.
    rope = read_rope(keys, types=("default",))
    keys.skip("original_max_position_embeddings")
    layer = Layer(rope, window=keys.optional_size("sliding_window"))
    return read_decoder(
        keys,
        equal_layers(keys, layer),
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
    )


PHI3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    defaults={
        "head_dim": None,
        "num_key_value_heads": None,
        "rope_theta": 10_000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    read=read,
    tensors=llama.TENSORS
    | {
        "attention.qkv": fused_qkv("self_attn.qkv_proj.weight"),
        "mlp.gate_up": fused_gate_up("mlp.gate_up_proj.weight"),
    },
)
