"""The demo model: a small Llama in Flax NNX, and its files as Hugging Face names them.

It exists to be trained; the engine reads the files and never this module. It knows no data.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
# Queries per attention block: scores to the right of a block's last query are never computed,
# which at 512 tokens saves almost half of what dense causal attention costs on a CPU.
QUERY_BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """The sizes that make one Llama."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_context: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, C = shape.hidden_size, shape.head_dim
        self.q_proj = _linear(D, shape.num_heads * C, dtype, rngs)
        self.k_proj = _linear(D, shape.num_kv_heads * C, dtype, rngs)
        self.v_proj = _linear(D, shape.num_kv_heads * C, dtype, rngs)
        self.o_proj = _linear(shape.num_heads * C, D, dtype, rngs, zero=True)
        self.head_dim = C

    def __call__(self, x_ND: Float[Array, "N D"], length: int) -> Float[Array, "N D"]:
        q_BTHC, k_BTKC, v_BTKC = (
            proj(x_ND).reshape(-1, length, proj.out_features // self.head_dim, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BTHC = causal_attention(rotate(q_BTHC), rotate(k_BTKC), v_BTKC)
        return self.o_proj(out_BTHC.reshape(x_ND.shape[0], -1))


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = shape.hidden_size, shape.mlp_size
        self.gate_proj = _linear(D, F, dtype, rngs)
        self.up_proj = _linear(D, F, dtype, rngs)
        self.down_proj = _linear(F, D, dtype, rngs, zero=True)

    def __call__(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class Block(nnx.Module):
    def __init__(self, shape: Shape, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_layernorm = _norm(shape, dtype, rngs)
        self.self_attn = Attention(shape, dtype, rngs)
        self.post_attention_layernorm = _norm(shape, dtype, rngs)
        self.mlp = Mlp(shape, dtype, rngs)

    def __call__(self, x_ND: Float[Array, "N D"], length: int) -> Float[Array, "N D"]:
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), length)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))


class Llama(nnx.Module):
    """Tokens to next-token logits; float32 weights, activations in `dtype`."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.embed_tokens = nnx.Embed(
            shape.vocab_size,
            shape.hidden_size,
            dtype=dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([Block(shape, dtype, rngs) for _ in range(shape.num_layers)])
        self.norm = _norm(shape, dtype, rngs)

    def hidden(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "N D"]:
        """The last norm's output, one row per token: XLA's CPU back end multiplies bfloat16
        matrices of two axes ten times as fast as those of three."""
        x_ND = self.embed_tokens(tokens_BT.reshape(-1))
        for layer in self.layers:
            x_ND = layer(x_ND, tokens_BT.shape[1])
        return self.norm(x_ND)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        logits_NV = self.embed_tokens.attend(self.hidden(tokens_BT)).astype(jnp.float32)
        return logits_NV.reshape(*tokens_BT.shape, -1)


def load_params(shape: Shape, params: nnx.State) -> Llama:
    """A float32 model with these weights."""
    model = Llama(shape, nnx.Rngs(0))
    nnx.update(model, params)
    return model


def rounded(params: nnx.State) -> nnx.State:
    """The weights as the saved bfloat16 file gives them back."""
    return jax.tree.map(lambda weight: weight.astype(jnp.bfloat16).astype(jnp.float32), params)


def rotate(x_BTHC: Float[Array, "B T H C"]) -> Float[Array, "B T H C"]:
    """RoPE by the position on axis T; channel c turns with channel c + C/2."""
    T, half = x_BTHC.shape[1], x_BTHC.shape[3] // 2
    frequency_c = ROPE_THETA ** (-jnp.arange(half) / half)
    angle_T1c = jnp.arange(T)[:, None, None] * frequency_c
    cos_T1c = jnp.cos(angle_T1c).astype(x_BTHC.dtype)
    sin_T1c = jnp.sin(angle_T1c).astype(x_BTHC.dtype)
    low, high = x_BTHC[..., :half], x_BTHC[..., half:]
    return jnp.concatenate(
        [low * cos_T1c - high * sin_T1c, high * cos_T1c + low * sin_T1c], axis=-1
    )


def causal_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
) -> Float[Array, "B T H C"]:
    """Softmax attention of every query over the keys up to its own, softmax in float32."""
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C) * C**-0.5
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores_BKGTS = jnp.einsum(
            "btkgc,bskc->bkgts",
            q_BTKGC[:, start:end],
            k_BTKC[:, :end],
            preferred_element_type=jnp.float32,
        )
        seen_TS = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        weights_BKGTS = jax.nn.softmax(jnp.where(seen_TS, scores_BKGTS, -jnp.inf))
        blocks.append(
            jnp.einsum("bkgts,bskc->btkgc", weights_BKGTS.astype(v_BTKC.dtype), v_BTKC[:, :end])
        )
    return jnp.concatenate(blocks, axis=1).reshape(B, T, H, C)


def _linear(
    size_in: int, size_out: int, dtype: jnp.dtype, rngs: nnx.Rngs, zero: bool = False
) -> nnx.Linear:
    """A linear map without bias; `zero` starts a block as the identity."""
    init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    return nnx.Linear(size_in, size_out, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)


def _norm(shape: Shape, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(shape.hidden_size, epsilon=NORM_EPS, dtype=dtype, rngs=rngs)


def hugging_face_config(shape: Shape, bos_id: int, eos_id: int) -> dict[str, object]:
    """config.json of this model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.mlp_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def hugging_face_tensors(model: Llama) -> dict[str, np.ndarray]:
    """The weights in bfloat16 by the names of Hugging Face's Llama; matrices are [out, in]."""
    tensors = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        array = np.asarray(value[...])
        name = ".".join(["model", *module, "weight"])
        tensors[name] = np.ascontiguousarray(array.T if leaf == "kernel" else array).astype(
            ml_dtypes.bfloat16
        )
    return tensors


def save_hugging_face(model: Llama, shape: Shape, bos_id: int, eos_id: int, out: Path) -> None:
    """Write the configuration and the weights; the weights appear whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", hugging_face_config(shape, bos_id, eos_id))
    _write_json(
        out / "generation_config.json",
        {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True, "temperature": 0.7},
    )
    partial = out / "model.safetensors.partial"
    save_file(hugging_face_tensors(model), partial, metadata={"format": "pt"})
    # safetensors writes for its owner only; whoever serves the model may be another user.
    partial.chmod(0o644)
    partial.replace(out / "model.safetensors")


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
