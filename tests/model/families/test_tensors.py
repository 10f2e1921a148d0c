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
}
del SMALL_CONFIGS["mixtral"]["moe_intermediate_size"]


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
def test_packing_copies_only_what_it_fuses(name):
    for weight in weights(read_config(SMALL_CONFIGS[name])):
        part = slices(weight, np.zeros(weight.shape, np.float32))[0]
        tensors = [np.ascontiguousarray(tensor) for tensor in weight.unpack(part)]
        fuses = len(tensors) > 1 or weight.name.endswith("attention.qkv")
        if not fuses:
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


def test_only_leftovers_of_other_programs_may_be_ignored():
    tied, untied = (read_config(config) for config in (hub.LLAMA_3_2_1B, hub.LLAMA_3_1_8B))
    assert ignorable("model.layers.0.self_attn.rotary_emb.inv_freq", untied)
    assert ignorable("lm_head.weight", tied)
    assert not ignorable("lm_head.weight", untied)
    assert not ignorable("model.layers.0.self_attn.q_proj.bias", untied)
