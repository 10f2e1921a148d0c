"""Keys of config.json that may be left unread: those that do nothing here, and those that are off.

It does not know families; a key that a family reads is not looked up here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

INERT = frozenset(
    {
        # What the file is.
        "architectures",
        "auto_map",
        "is_llama_config",
        "model_type",
        "name_or_path",
        "tokenizer_class",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        # Training.
        "attention_dropout",
        "embd_pdrop",
        "gradient_checkpointing",
        "hidden_dropout",
        "initializer_range",
        "output_router_logits",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        # How transformers runs it.
        "attn_implementation",
        "cache_implementation",
        "chunk_size_feed_forward",
        "is_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_encoder_decoder",
        "torchscript",
        "use_bfloat16",
        "use_cache",
        # Heads for classification, which these architectures do not have.
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        # Text and sampling: the tokenizer's and generation_config.json's business.
        "do_sample",
        "max_length",
        "min_length",
        "num_beams",
        "pad_token_id",
        "prefix",
        "repetition_penalty",
        "sep_token_id",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""Keys that cannot change what a model computes."""

OFF: Mapping[str, Sequence[Any]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
    "num_nextn_predict_layers": (0, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1,),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}
"""Keys that a family may have no use for, with the values that ask for nothing."""
