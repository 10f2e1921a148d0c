"""DeepSeek-V3: latent attention, dense layers and then experts, a router of sigmoids in groups."""

import re

from model.config import Experts, Latent, Layer, ModelConfig
from model.families import llama
from model.families.decoder import ACTIVATIONS, Family, read_decoder
from model.families.keys import Keys
from model.families.rope import query_scale, read_rope
from model.families.tensors import gate_up, heads, heads_of_rope_pairs, linear, same

LATENT_NORM_EPS = 1e-6
"""Of the norms of latents, whatever rms_norm_eps says of the others."""


def read(keys: Keys) -> ModelConfig:
    rope, latent = read_rope(keys), _latent(keys)
    first_experts = keys.integer("first_k_dense_replace")
    if keys.integer("moe_layer_freq") != 1:
        raise keys.refusal("moe_layer_freq", "1")
    # Layers that predict the tokens after the next, and how training and its machines were set.
    keys.skip("num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha", "ep_size", "seq_aux")
    return read_decoder(
        keys,
        [Layer(rope, experts=i >= first_experts) for i in range(keys.size("num_hidden_layers"))],
        activation=keys.choice("hidden_act", options=ACTIVATIONS),
        attention_scale=(latent.nope_dim + latent.rope_dim) ** -0.5 * query_scale(keys),
        experts=_experts(keys),
        head_dim=latent.nope_dim + latent.rope_dim,
        latent=latent,
    )


def _latent(keys: Keys) -> Latent:
    latent = Latent(
        q_rank=keys.optional_size("q_lora_rank"),
        kv_rank=keys.size("kv_lora_rank"),
        nope_dim=keys.size("qk_nope_head_dim"),
        rope_dim=keys.size("qk_rope_head_dim"),
        value_dim=keys.size("v_head_dim"),
        norm_eps=LATENT_NORM_EPS,
    )
    if not keys.flag("rope_interleave"):
        raise keys.refusal("rope_interleave", "true")
    sums = {"head_dim": latent.rope_dim, "qk_head_dim": latent.nope_dim + latent.rope_dim}
    for key, size in sums.items():
        if keys.optional_size(key) not in (None, size):
            raise keys.refusal(key, f"{size}, which the other sizes make it")
    return latent


def _experts(keys: Keys) -> Experts:
    size = keys.size("moe_intermediate_size")
    return Experts(
        num_experts=keys.size("n_routed_experts", "num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        size=size,
        normalize=keys.flag("norm_topk_prob"),
        scoring=keys.choice("scoring_func", options={"sigmoid": "sigmoid"}),
        selection_bias=keys.choice("topk_method", options={"noaux_tc": True}),
        num_groups=keys.size("n_group"),
        top_groups=keys.size("topk_group"),
        scale=keys.number("routed_scaling_factor"),
        shared_size=size * (keys.optional_integer("n_shared_experts") or 0),
    )


def predicts_further_tokens(name: str, config: ModelConfig) -> bool:
    """Whether tensor `name` is of the layers after the model's own, for speculation alone."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return (
        config.architecture == DEEPSEEK_V3.architecture
        and layer is not None
        and int(layer[1]) >= config.num_layers
    )


DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    defaults={
        "head_dim": None,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": None,
        "qk_head_dim": None,
        "rope_interleave": True,
        "rope_theta": 10_000.0,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
    },
    read=read,
    tensors=llama.TENSORS
    | {
        "attention.q": heads_of_rope_pairs("self_attn.q_proj.weight"),
        "attention.q_down": linear("self_attn.q_a_proj.weight"),
        "attention.q_latent_norm": same("self_attn.q_a_layernorm.weight"),
        "attention.q_up": heads_of_rope_pairs("self_attn.q_b_proj.weight"),
        "attention.kv_down": heads_of_rope_pairs("self_attn.kv_a_proj_with_mqa.weight"),
        "attention.kv_latent_norm": same("self_attn.kv_a_layernorm.weight"),
        "attention.kv_up": heads("self_attn.kv_b_proj.weight"),
        "moe.router": linear("mlp.gate.weight"),
        "moe.selection_bias": same("mlp.gate.e_score_correction_bias"),
        "moe.gate_up": gate_up(
            "mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"
        ),
        "moe.down": linear("mlp.experts.{expert}.down_proj.weight"),
        "moe.shared_gate_up": gate_up(
            "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"
        ),
        "moe.shared_down": linear("mlp.shared_experts.down_proj.weight"),
    },
)
