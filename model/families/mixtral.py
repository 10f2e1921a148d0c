"""Mixtral: Mistral with experts in every layer."""

from model.config import Experts, Layer, ModelConfig
from model.families import llama
from model.families.decoder import ACTIVATIONS, Family, equal_layers, read_decoder
from model.families.keys import Keys
from model.families.rope import read_rope
from model.families.tensors import gate_up, linear


def read(keys: Keys) -> ModelConfig:
    window = keys.optional_size("sliding_window")
    experts = Experts(
        num_experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        size=keys.size("intermediate_size"),
        normalize=True,
    )
    return read_decoder(
        keys,
        equal_layers(keys, Layer(read_rope(keys), window, experts=True)),
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
        experts=experts,
    )


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    defaults={
        "head_dim": None,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    read=read,
    tensors=llama.TENSORS
    | {
        "moe.router": linear("block_sparse_moe.gate.weight"),
        "moe.gate_up": gate_up(
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
        ),
        "moe.down": linear("block_sparse_moe.experts.{expert}.w2.weight"),
    },
)
