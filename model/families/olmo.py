"""OLMo 2: norms only after the blocks, and q and k norms over all heads at once."""

from model.config import Layer, ModelConfig
from model.families import llama
from model.families.decoder import ACTIVATIONS, Family, equal_layers, read_decoder
from model.families.keys import Keys
from model.families.rope import read_rope
from model.families.tensors import flat, same


def read(keys: Keys) -> ModelConfig:
    return read_decoder(
        keys,
        equal_layers(keys, Layer(read_rope(keys))),
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
        norm_placement="post",
        qk_norm="all",
        qkv_bias=keys.flag("attention_bias"),
        out_bias=keys.flag("attention_bias"),
    )


OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "num_key_value_heads": None,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
    read=read,
    tensors=llama.TENSORS
    | {
        "attention.q_norm_all": flat("self_attn.q_norm.weight"),
        "attention.k_norm_all": flat("self_attn.k_norm.weight"),
        "attention_post_norm": same("post_attention_layernorm.weight"),
        "mlp_post_norm": same("post_feedforward_layernorm.weight"),
    },
)
