from typing import Any

import ml_dtypes
import numpy as np
import pytest

from model.families import ignorable, read_config, weights
from model.weights import Weight
from tests.assets import ASSETS, needs_assets
from tests.model.families import hub
from tests.model.reference import FAMILY_NAMES, load_tensors

SMALL: dict[str, Any] = {
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}
SMALL_LATENT = {
    "first_k_dense_replace": 1,
    "head_dim": 4,
    "kv_lora_rank": 7,
    "n_group": 2,
    "n_routed_experts": 4,
    "num_key_value_heads": 6,
    "q_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "topk_group": 1,
    "v_head_dim": 2,
}
FEW_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}

SMALL_CONFIGS = {
    "llama": hub.LLAMA_3_1_8B | SMALL,
    "llama with biases": hub.LLAMA_3_1_8B | SMALL | {"attention_bias": True, "mlp_bias": True},
    "llama tied": hub.LLAMA_3_2_1B | SMALL,
    "mistral": hub.MISTRAL_7B_V01 | SMALL,
    "mixtral": hub.MIXTRAL_8X7B | SMALL | FEW_EXPERTS | {"num_local_experts": 3},
    "qwen2": hub.QWEN2_5_7B | SMALL,
    "qwen3": hub.QWEN3_8B | SMALL,
    "qwen3_moe": hub.QWEN3_30B_A3B | SMALL | FEW_EXPERTS | {"num_experts": 3},
    "gemma2": hub.GEMMA_2_2B | SMALL,
    "gemma3": hub.GEMMA_3_1B_IT | SMALL,
    "phi3": hub.PHI_3_MINI_4K | SMALL,
    "olmo2": hub.OLMO_2_7B | SMALL | {"head_dim": 4},
    "gpt_oss": hub.GPT_OSS_20B_BF16
    | SMALL
    | {"layer_types": None, "num_experts_per_tok": 2, "experts_per_token": 2}
    | {"num_local_experts": 3},
    "deepseek_v3": hub.DEEPSEEK_V3 | SMALL | FEW_EXPERTS | SMALL_LATENT,
    "deepseek_v3 without q_lora_rank": hub.MOONLIGHT_16B_A3B
    | SMALL
    | FEW_EXPERTS
    | SMALL_LATENT
    | {"q_lora_rank": None},
}
del SMALL_CONFIGS["mixtral"]["moe_intermediate_size"]


ROTATED = ("attention.q", "attention.q_up", "attention.kv_down")
"""Weights whose rotated channels DeepSeek has in another order."""


def slices(weight: Weight, array: np.ndarray) -> list[np.ndarray]:
    """What `pack` makes of each of the weight's parts."""
    return [array] if len(weight.parts) == 1 else list(array)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_packing_undoes_unpacking_bit_by_bit(name, dtype):
    rng = np.random.default_rng(0)
    for weight in weights(read_config(SMALL_CONFIGS[name])):
        array = rng.standard_normal(weight.shape).astype(dtype)
        for names, part in zip(weight.parts, slices(weight, array), strict=True):
            tensors = weight.unpack(part)
            assert len(tensors) == len(names), weight.name
            assert same_bits(weight.pack(tensors), part), weight.name


@needs_assets
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_weights_hold_every_tensor_of_a_checkpoint_once_and_give_it_back(name):
    config, tensors = load_tensors(ASSETS / "families" / name)
    left = dict(tensors)
    for weight in weights(config):
        for names in weight.parts:
            stored = [left.pop(tensor) for tensor in names]
            returned = weight.unpack(weight.pack(stored))
            assert all(map(same_bits, stored, returned)), weight.name
    assert not left


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_packing_copies_only_what_it_fuses_or_reorders(name):
    for weight in weights(read_config(SMALL_CONFIGS[name])):
        part = slices(weight, np.zeros(weight.shape, np.float32))[0]
        tensors = [np.ascontiguousarray(tensor) for tensor in weight.unpack(part)]
        fuses = len(tensors) > 1 or weight.name.endswith("attention.qkv")
        if not fuses and not weight.name.endswith(ROTATED):
            assert np.shares_memory(weight.pack(tensors), tensors[0]), weight.name


def test_query_heads_stand_with_the_kv_head_they_share():
    model = read_config(SMALL_CONFIGS["llama"])
    qkv = next(weight for weight in weights(model) if weight.name.endswith(".qkv"))
    G, C, D = model.group_size, model.head_dim, model.hidden_size
    q = np.arange(model.num_heads * C * D).reshape(-1, D)
    k = -np.arange(model.num_kv_heads * C * D).reshape(-1, D)
    packed = qkv.pack([q, k, k])
    head = 1 * G + 2  # the third query head of the second kv head
    np.testing.assert_array_equal(packed[:, 1, 2], q[head * C : (head + 1) * C].T)
    np.testing.assert_array_equal(packed[:, 1, G], k[C : 2 * C].T)


def test_neighbours_that_rotate_as_a_pair_come_to_stand_half_a_width_apart():
    model = read_config(SMALL_CONFIGS["deepseek_v3"])
    kv_down = next(weight for weight in weights(model) if weight.name.endswith(".kv_down"))
    tensor = np.arange(11)[:, None] * np.ones((1, 24), int)
    packed = kv_down.pack([tensor])[0]
    assert packed.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 10]


def test_only_leftovers_of_other_programs_may_be_ignored():
    tied, untied = (read_config(config) for config in (hub.LLAMA_3_2_1B, hub.LLAMA_3_1_8B))
    deepseek = read_config(hub.DEEPSEEK_V3)
    assert ignorable("model.layers.61.eh_proj.weight", deepseek)
    assert not ignorable("model.layers.60.mlp.gate.bias", deepseek)
    assert not ignorable("model.layers.61.mlp.down_proj.weight", untied)
    assert ignorable("model.layers.0.self_attn.rotary_emb.inv_freq", untied)
    assert ignorable("lm_head.weight", tied)
    assert not ignorable("lm_head.weight", untied)
    assert not ignorable("model.layers.0.self_attn.q_proj.bias", untied)
