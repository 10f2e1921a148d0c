"""Mistral: Llama with a sliding window in every layer."""

from model.config import Layer, ModelConfig
from model.families import llama
from model.families.decoder import ACTIVATIONS, Family, equal_layers, read_decoder
from model.families.keys import Keys
from model.families.rope import read_rope


def read(keys: Keys) -> ModelConfig:
    layer = Layer(read_rope(keys), window=keys.optional_size("sliding_window"))
    return read_decoder(
        keys,
        equal_layers(keys, layer),
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
    )


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults={
        "head_dim": None,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    read=read,
    tensors=llama.TENSORS,
)
