"""A Hugging Face Llama as a GGUF file, of random weights as of trained ones; without a vocabulary.

It knows no other architecture: what llama.cpp computes must be what the others compute.
"""

# gguf is in the peer's environment, which the type checker does not see.
# pyright: reportMissingImports=false

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURE = "LlamaForCausalLM"
DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "rope_scaling": None,
}
"""Where anything else would have to be written, which is not."""

WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, path: Path, dtype: str) -> None:
    """Write `path` from the safetensors in `model`: matrices as `dtype`, norms as float32.

    Raises ValueError for a model that isn't a plain Llama.
    """
    import gguf

    config = read_config(model)
    heads, kv_heads = head_counts(config)
    kind = {
        "float32": gguf.GGMLQuantizationType.F32,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
    }[dtype]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_theta(config))
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    for name, values in tensors(model):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        their_name = gguf_name(name)
        if their_name.endswith(("attn_q.weight", "attn_k.weight")):
            values = interleave(values, heads if "attn_q" in their_name else kv_heads)
        if values.ndim == 1:
            writer.add_tensor(their_name, values)
        else:
            writer.add_tensor(their_name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_config(model: Path) -> dict[str, Any]:
    """Raises ValueError for a model that isn't a plain Llama."""
    config = json.loads((model / "config.json").read_text())
    if config.get("architectures") != [ARCHITECTURE]:
        raise ValueError(
            f"{model} is {config.get('architectures')}; only {ARCHITECTURE} can be made GGUF here"
        )
    for key, default in DEFAULTS.items():
        if config.get(key, default) != default:
            raise ValueError(
                f"{key} of {model} is {config[key]}; only {default} can be made GGUF here"
            )
    return config


def rope_theta(config: dict[str, Any]) -> float:
    """From either of the two places where Hugging Face writes it."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']}; only default can be made GGUF here")
    return rope.get("rope_theta") or config.get("rope_theta", 10_000.0)


def head_counts(config: dict[str, Any]) -> tuple[int, int]:
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a Hugging Face Llama."""
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{IN_LAYER[part]}.weight"


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of q or k in the order of llama.cpp, whose rotary embedding turns neighbours.

    Hugging Face's turns channel i of a head with channel i + half its width.
    """
    num_rows, width = rows.shape
    halves = rows.reshape(num_heads, 2, num_rows // num_heads // 2, width)
    return halves.swapaxes(1, 2).reshape(num_rows, width)


def tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All that is in the safetensors files of `model`, as float32.

    Read by hand, since the library for NumPy refuses bfloat16.
    """
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ValueError(f"there are no *.safetensors in {model}")
    for file in files:
        data = np.memmap(file, mode="r")
        start = 8 + int(data[:8].view(np.uint64)[0])
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            values = as_float32(data[start + begin : start + end], tensor["dtype"])
            yield name, values.reshape(tensor["shape"])


def as_float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a safetensors file as numbers, flat."""
    match dtype:
        case "F32":
            return data.view(np.float32)
        case "F16":
            return data.view(np.float16).astype(np.float32)
        case "BF16":
            # The upper half of a float32.
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            raise ValueError(f"a tensor is {dtype}; only F32, F16 and BF16 can be made GGUF here")
