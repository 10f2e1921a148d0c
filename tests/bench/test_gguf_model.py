"""Llama checkpoints as GGUF: the parts that need no gguf."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.peers.gguf_model import gguf_name, interleave, read_config, rope_theta, tensors

CONFIG = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}


def write(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def rotated_halves(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Hugging Face's rotary embedding of one head."""
    a, b = np.split(x, 2)
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    )


def rotated_neighbours(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """llama.cpp's."""
    a, b = x[0::2], x[1::2]
    out = np.empty_like(x)
    out[0::2] = a * np.cos(angles) - b * np.sin(angles)
    out[1::2] = b * np.cos(angles) + a * np.sin(angles)
    return out


def test_scores_are_the_same_under_either_rotary_embedding():
    rng = np.random.default_rng(0)
    num_heads, size, width = 3, 8, 5
    q, k = rng.standard_normal((2, num_heads * size, width))
    x_query, x_key = rng.standard_normal((2, width))
    angles_query, angles_key = rng.standard_normal((2, size // 2))

    def scores(rotated, q, k):
        queries, keys = (q @ x_query).reshape(num_heads, size), (k @ x_key).reshape(num_heads, size)
        return [
            rotated(query, angles_query) @ rotated(key, angles_key)
            for query, key in zip(queries, keys, strict=True)
        ]

    np.testing.assert_allclose(
        scores(rotated_neighbours, interleave(q, num_heads), interleave(k, num_heads)),
        scores(rotated_halves, q, k),
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.11.self_attn.k_proj.weight", "blk.11.attn_k.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ],
)
def test_names_are_those_of_llama_cpp(theirs, ours):
    assert gguf_name(theirs) == ours


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_of_each_type_are_read_from_all_files(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal((2, 3)).astype(dtype)
    save_file({"a": values}, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_file({"b": values[0]}, tmp_path / "2.safetensors")
    found = dict(tensors(tmp_path))
    np.testing.assert_array_equal(found["a"], values.astype(np.float32))
    np.testing.assert_array_equal(found["b"], values[0].astype(np.float32))


def test_weights_of_another_type_are_refused(tmp_path):
    save_file({"a": np.zeros(2, np.int8)}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match="a tensor is I8; only F32, F16 and BF16"):
        list(tensors(tmp_path))


def test_model_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are no \*\.safetensors"):
        list(tensors(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, r"is \['Qwen3ForCausalLM'\]; only Llama"),
        ({"attention_bias": True}, "attention_bias of .* is True; only False"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of .*; only None"),
    ],
)
def test_model_that_is_no_plain_llama_is_refused(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason):
        read_config(write(tmp_path, **changes))


def test_rope_theta_is_found_in_either_place():
    assert rope_theta({}) == 10_000
    assert rope_theta({"rope_theta": 5e5}) == 5e5
    assert rope_theta({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}) == 5e5
    with pytest.raises(ValueError, match="rope_type is llama3; only default"):
        rope_theta({"rope_parameters": {"rope_type": "llama3"}})
