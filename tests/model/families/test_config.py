import json
import math
from dataclasses import replace
from typing import Any

import pytest

from model.config import (
    ClampedSwiglu,
    Experts,
    Latent,
    Layer,
    LinearScaling,
    ModelConfig,
    Rope,
    YarnScaling,
)
from model.families import FAMILIES, UnsupportedModel, read_config, read_model_config, weights
from tests.assets import ASSETS, needs_assets
from tests.model.families import hub
from tests.model.reference import FAMILY_NAMES

WITHOUT = object()
"""Stands for a key that is taken out of a config.json."""


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in (config | changes).items() if v is not WITHOUT}


def windows(model: ModelConfig) -> list[int | None]:
    return [layer.window for layer in model.layers]


@needs_assets
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_both_spellings_of_a_config_describe_the_same_model(name):
    directory = ASSETS / "families" / name
    new, old = (
        read_config(json.loads((directory / file).read_text()))
        for file in ("config.json", "config_hub.json")
    )
    assert new == old


@pytest.mark.parametrize("name", hub.NUM_PARAMETERS)
def test_model_of_the_hub_has_the_parameters_its_page_states(name):
    config, num_parameters = hub.NUM_PARAMETERS[name]
    assert sum(math.prod(weight.shape) for weight in weights(read_config(config))) == num_parameters


def test_every_architecture_is_tried_with_a_config_of_the_hub():
    tried = {config["architectures"][0] for config, _ in hub.NUM_PARAMETERS.values()}
    assert tried == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (hub.PHI_3_5_MINI, {}, "rope_scaling.type = 'longrope'; supported: default"),
        (hub.GPT_OSS_20B, {}, "quantization_config.*mxfp4.*unquantised"),
        (hub.LLAMA_3_1_8B, {"architectures": ["DeepseekV2ForCausalLM"]}, "DeepseekV2.*supported: "),
        (hub.LLAMA_3_1_8B, {"architectures": WITHOUT, "model_type": "bert"}, "model_type 'bert'"),
        (hub.LLAMA_3_1_8B, {"model_type": "mistral"}, "model_type = 'mistral'; supported: 'llama'"),
        (hub.LLAMA_3_1_8B, {"hidden_size": WITHOUT}, "has no hidden_size"),
        (hub.LLAMA_3_1_8B, {"torch_dtype": WITHOUT}, r"has no dtype \(or torch_dtype\)"),
        (hub.LLAMA_3_1_8B, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype = 'float8_e4m3fn'"),
        (hub.LLAMA_3_1_8B, {"dtype": "float32"}, "dtype = 'float32' and torch_dtype = 'bfloat16'"),
        (hub.LLAMA_3_1_8B, {"hidden_size": "4096"}, "hidden_size = '4096'; supported: an integer"),
        (hub.LLAMA_3_1_8B, {"hidden_size": 4100}, "hidden_size = 4100; supported: multiples"),
        (hub.LLAMA_3_1_8B, {"vocab_size": 0}, "vocab_size = 0; supported: a positive integer"),
        (hub.LLAMA_3_1_8B, {"num_key_value_heads": 5}, "num_heads is 32 and num_kv_heads 5"),
        (hub.LLAMA_3_1_8B, {"eos_token_id": "</s>"}, "must be an integer or a list, not '</s>'"),
        (hub.LLAMA_3_1_8B, {"hidden_act": "relu"}, "hidden_act = 'relu'; supported: silu"),
        (hub.LLAMA_3_1_8B, {"attention_bias": "no"}, "attention_bias = 'no'; supported: true or"),
        (hub.LLAMA_3_1_8B, {"logit_scale": 0.5}, "logit_scale = 0.5, a key that is not known"),
        (hub.LLAMA_3_1_8B, {"pretraining_tp": 2}, "pretraining_tp = 2; supported: 1"),
        (hub.LLAMA_3_1_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (hub.LLAMA_3_1_8B, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        (hub.LLAMA_3_1_8B, {"sliding_window": 4096}, "sliding_window = 4096; supported: None"),
        (hub.LLAMA_3_1_8B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (hub.LLAMA_3_1_8B, {"rope_scaling": {"type": "linear"}}, "no rope_scaling.factor"),
        (
            hub.LLAMA_3_1_8B,
            {"rope_scaling": {"type": "linear", "factor": 2.0, "ntk": True}},
            "rope_scaling.ntk = True, a key that is not known",
        ),
        (
            hub.LLAMA_3_1_8B,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}, "rope_scaling": None},
            "rope_theta = 500000.0 but rope_parameters.rope_theta = 1.0",
        ),
        (hub.MISTRAL_7B_V01, {"attention_bias": True}, "attention_bias = True; supported: False"),
        (hub.MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "chooses 9 of 8 experts"),
        (hub.QWEN2_5_7B, {"use_mrope": True}, "use_mrope = True"),
        (hub.QWEN2_5_7B, {"layer_types": ["sliding_attention"] * 28}, "supported: full_attention,"),
        (hub.QWEN2_5_7B, {"layer_types": ["full_attention"]}, "for each of 28 layers"),
        (hub.QWEN3_30B_A3B, {"use_sliding_window": True}, "use_sliding_window = True"),
        (hub.QWEN3_30B_A3B, {"num_local_experts": 64}, "num_experts = 128 and num_local_experts"),
        (hub.GEMMA_2_2B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (hub.GEMMA_2_2B, {"hidden_act": "silu"}, "hidden_activation = .* and hidden_act = 'silu'"),
        (hub.GEMMA_3_1B_IT, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (
            hub.GEMMA_3_1B_IT,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "an object with full_attention and sliding_attention",
        ),
        (hub.DEEPSEEK_V3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (hub.DEEPSEEK_V3, {"attention_bias": True}, "attention_bias = True; supported: False"),
        (hub.DEEPSEEK_V3, {"rope_interleave": False}, "rope_interleave = False; supported: true"),
        (hub.DEEPSEEK_V3, {"scoring_func": "softmax"}, "'softmax'; supported: sigmoid"),
        (hub.DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method = 'greedy'; supported: noaux_tc"),
        (hub.DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq = 2; supported: 1"),
        (hub.DEEPSEEK_V3, {"head_dim": 128}, "head_dim = 128; supported: 64, which the other"),
        (hub.DEEPSEEK_V3, {"qk_head_dim": 128}, "qk_head_dim = 128; supported: 192, which"),
        (hub.DEEPSEEK_V3, {"num_key_value_heads": 8}, "num_kv_heads is 8; latent attention has"),
        (hub.DEEPSEEK_V3, {"qk_rope_head_dim": 63}, "rope_dim is 63; rotary embedding needs"),
        (hub.DEEPSEEK_V3, {"n_group": 7}, "256 experts stand in 7 groups"),
        (hub.DEEPSEEK_V3, {"n_group": 256}, "in 256 groups; groups must be equal, of two"),
        (hub.DEEPSEEK_V3, {"topk_group": 9}, "8 experts of 9 of 8 groups of 32"),
        (hub.DEEPSEEK_V3, {"n_group": 64, "topk_group": 1}, "8 experts of 1 of 64 groups of 4"),
    ],
)
def test_config_that_is_not_computed_is_refused_by_name(config, changes, named):
    with pytest.raises(UnsupportedModel, match=named):
        read_config(changed(config, changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be positive"),
        ({"num_kv_heads": 3}, "num_heads is 32 and num_kv_heads 3"),
        ({"head_dim": 63}, "head_dim is 63; rotary embedding needs pairs"),
        ({"layers": ()}, "there are no layers"),
        ({"layers": (Layer(Rope(1e4), window=0),)}, "layer 0 has window 0"),
        ({"layers": (Layer(Rope(1e4), experts=True),)}, "layer 0 has experts, but"),
        ({"experts": Experts(4, 5, 8, normalize=True)}, "chooses 5 of 4 experts"),
        ({"latent": Latent(None, 64, 16, 16, 24, 1e-6)}, "head_dim is 128; latent attention's is"),
    ],
)
def test_model_that_contradicts_itself_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(read_config(hub.LLAMA_3_1_8B), **changes)


def test_refusal_starts_with_the_architecture():
    with pytest.raises(UnsupportedModel, match=r"^Phi3ForCausalLM: config\.json has "):
        read_config(hub.PHI_3_5_MINI)


@pytest.mark.parametrize("key", ["_name_or_path", "transformers_version", "pad_token_id"])
def test_keys_that_compute_nothing_change_nothing(key):
    assert read_config(hub.QWEN3_8B | {key: 7}) == read_config(hub.QWEN3_8B)


def test_file_without_architectures_is_known_by_its_model_type():
    config = changed(hub.QWEN3_8B, {"architectures": WITHOUT})
    assert read_config(config) == read_config(hub.QWEN3_8B)


def test_llama_without_kv_heads_or_head_dim_derives_them():
    model = read_config(changed(hub.LLAMA_2_7B, {"num_key_value_heads": WITHOUT, "head_dim": None}))
    assert (model.num_kv_heads, model.head_dim) == (32, 128)


def test_mistral_has_its_window_in_every_layer():
    assert windows(read_config(hub.MISTRAL_7B_V01)) == [4096] * 32
    assert windows(read_config(hub.MISTRAL_7B_V03)) == [None] * 32


def test_qwen_slides_from_max_window_layers_on_where_sliding_is_on():
    assert windows(read_config(hub.QWEN2_5_7B)) == [None] * 28
    sliding = hub.QWEN2_5_7B | {
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 21,
    }
    assert windows(read_config(sliding)) == [None] * 21 + [64] * 7
    listed = sliding | {"layer_types": ["sliding_attention"] + ["full_attention"] * 27}
    assert windows(read_config(listed)) == [64] + [None] * 27


def test_qwen_moe_layers_are_dense_where_listed_or_out_of_step():
    config = hub.QWEN3_30B_A3B | {
        "num_hidden_layers": 6,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
    }
    model = read_config(config)
    assert [layer.experts for layer in model.layers] == [False, True, False, False, False, True]
    names = {weight.name for weight in weights(model)}
    assert {"layers.1.moe.router", "layers.3.mlp.gate_up"} < names


def test_gemma2_slides_in_even_layers():
    assert windows(read_config(hub.GEMMA_2_2B))[:3] == [4096, None, 4096]


def test_gemma3_turns_sliding_and_full_layers_differently():
    model = read_config(hub.GEMMA_3_1B_IT | {"rope_scaling": {"type": "linear", "factor": 8.0}})
    assert windows(model)[:7] == [512] * 5 + [None, 512]
    assert model.layers[0].rope == Rope(10_000.0)
    assert model.layers[5].rope == Rope(1_000_000.0, LinearScaling(8.0))
    assert model.tie_embeddings


def test_gpt_oss_takes_its_clamp_from_the_file():
    model = read_config(hub.GPT_OSS_20B_BF16 | {"swiglu_limit": 5.0})
    assert model.activation == ClampedSwiglu(alpha=1.702, limit=5.0)


@pytest.mark.parametrize(
    ("changes", "attention_factor"),
    [
        ({}, 0.1 * math.log(4.0) + 1.0),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
    ],
)
def test_yarn_is_read_for_any_family(changes, attention_factor):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} | changes
    rope = read_config(hub.QWEN2_5_7B | {"rope_scaling": scaling}).layers[0].rope
    assert rope.scaling == YarnScaling(4.0, 32.0, 1.0, 32768, attention_factor)


def test_deepseek_has_experts_after_its_first_layers_and_shared_ones_as_one_block():
    model = read_config(hub.MOONLIGHT_16B_A3B)
    assert [layer.experts for layer in model.layers] == [False] + [True] * 26
    assert model.experts
    assert model.latent
    assert (model.experts.num_groups, model.experts.shared_size) == (1, 2 * 1408)
    assert (model.head_dim, model.rope_dim, model.value_dim) == (192, 64, 128)
    assert model.latent.q_rank is None
    assert (model.norm_eps, model.latent.norm_eps) == (1e-5, 1e-6)


def test_deepseek_scales_attention_by_what_yarn_asks_of_queries_and_keys():
    plain, stretched = read_config(hub.MOONLIGHT_16B_A3B), read_config(hub.DEEPSEEK_V3)
    assert plain.attention_scale == pytest.approx(192**-0.5)
    assert stretched.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    scaling = stretched.layers[0].rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == 1.0


def test_end_ids_come_from_generation_config_where_it_has_any(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub.QWEN3_8B))
    assert read_model_config(tmp_path).eos_ids == (151645,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert read_model_config(tmp_path).eos_ids == (151645, 151643)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 5, "eos_token_id": null}')
    model = read_model_config(tmp_path)
    assert (model.bos_id, model.eos_ids) == (5, (151645,))


def test_directory_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"config\.json does not exist"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="is not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnsupportedModel, match="holds a list, not an object"):
        read_model_config(tmp_path)
