"""A slow, obvious decoder in NumPy float64, to compare the real one with.

No cache, no batches, no mesh: every token's logits from all the tokens before it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401, makes NumPy know bfloat16
import numpy as np
from safetensors.numpy import load_file

from model.config import ClampedSwiglu, Experts, Latent, Layer, ModelConfig
from model.families import read_model_config
from model.families import weights as family_weights
from model.rope import inverse_frequencies
from tests.assets import ASSETS

Weights = Mapping[str, np.ndarray]


FAMILY_NAMES = (
    "llama",
    "llama_bf16",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_sharded",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_oss",
    "deepseek_v3",
)
"""The tiny checkpoints that this reference, and the decoder, can compute."""


def load_family(name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """One of the tiny checkpoints: its configuration, and its weights in our layout."""
    return load_model(ASSETS / "families" / name)


def load_model(directory: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    config, tensors = load_tensors(directory)
    found: dict[str, np.ndarray] = {}
    for weight in family_weights(config):
        parts = [weight.pack([tensors[name] for name in names]) for names in weight.parts]
        found[weight.name] = parts[0] if len(parts) == 1 else np.stack(parts)
        assert found[weight.name].shape == weight.shape, weight.name
    return config, found


def load_tensors(directory: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A checkpoint's configuration, and its tensors as they are stored."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return read_model_config(directory), tensors


def load_expected(name: str) -> tuple[list[list[int]], list[list[int]], list[np.ndarray]]:
    """Prompts, greedy tokens after them, and logits of the prompts' last positions."""
    directory = ASSETS / "families" / name
    expected = json.loads((directory / "expected.json").read_text())
    with np.load(directory / "expected.npz") as arrays:
        logits = [arrays[f"logits_{i}"] for i in range(len(expected["prompts"]))]
    return expected["prompts"], expected["generated"], logits


def logits(config: ModelConfig, weights: Weights, token_ids: Sequence[int]) -> np.ndarray:
    """[T, V]: at each position, the logits of the token after it."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    # Activations are float32 in the model that this stands for, and so is the scale.
    x_TD = w["embedding"][list(token_ids)] * np.float32(config.embedding_scale)
    for i, layer in enumerate(config.layers):
        prefix = f"layers.{i}."
        own = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
        x_TD = decoder_layer(config, layer, own, x_TD)
    x_TD = norm(config, x_TD, w["final_norm"])
    logits_TV = x_TD @ (w["embedding"].T if config.tie_embeddings else w["head"])
    return softcap(logits_TV, config.logit_softcap)


def decoder_layer(config: ModelConfig, layer: Layer, w: Weights, x_TD: np.ndarray) -> np.ndarray:
    """`w` holds this layer's weights, named without the layer."""
    before, after = config.norm_placement != "post", config.norm_placement != "pre"

    y_TD = norm(config, x_TD, w["attention_norm"]) if before else x_TD
    y_TD = attention(config, layer, w, y_TD)
    x_TD = x_TD + (norm(config, y_TD, w["attention_post_norm"]) if after else y_TD)

    y_TD = norm(config, x_TD, w["mlp_norm"]) if before else x_TD
    y_TD = mixture(config, w, y_TD) if layer.experts else dense(config, w, y_TD)
    return x_TD + (norm(config, y_TD, w["mlp_post_norm"]) if after else y_TD)


def attention(config: ModelConfig, layer: Layer, w: Weights, x_TD: np.ndarray) -> np.ndarray:
    T = len(x_TD)
    if config.latent:
        q_TKGC, k_TKC, v_TKU = latent_heads(config, config.latent, layer, w, x_TD)
    else:
        q_TKGC, k_TKC, v_TKU = plain_heads(config, layer, w, x_TD)

    scores_KGTS = np.einsum("tkgc,skc->kgts", q_TKGC, k_TKC) * config.attention_scale
    scores_KGTS = softcap(scores_KGTS, config.attention_softcap)
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen_TS = distance_TS >= 0
    if layer.window is not None:
        seen_TS &= distance_TS < layer.window
    scores_KGTS = np.where(seen_TS, scores_KGTS, -np.inf)
    if config.sinks:
        sinks_KGT1 = np.broadcast_to(
            w["attention.sinks"][:, :, None, None], (*q_TKGC.shape[1:3], T, 1)
        )
        scores_KGTS = np.concatenate([scores_KGTS, sinks_KGT1], axis=-1)
    probabilities_KGTS = softmax(scores_KGTS)[..., :T]

    y_TKGU = np.einsum("kgts,sku->tkgu", probabilities_KGTS, v_TKU)
    y_TD = np.einsum("tkgu,kgud->td", y_TKGU, w["attention.out"])
    return y_TD + w["attention.out_bias"] if config.out_bias else y_TD


def plain_heads(
    config: ModelConfig, layer: Layer, w: Weights, x_TD: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys, rotated, and values."""
    T, G = len(x_TD), config.group_size
    qkv_TKNC = np.einsum("td,dknc->tknc", x_TD, w["attention.qkv"])
    if config.qkv_bias:
        qkv_TKNC = qkv_TKNC + w["attention.qkv_bias"]
    q_TKGC, k_TKC, v_TKC = qkv_TKNC[:, :, :G], qkv_TKNC[:, :, G], qkv_TKNC[:, :, G + 1]

    if config.qk_norm == "head":
        q_TKGC = norm(config, q_TKGC, w["attention.q_norm"])
        k_TKC = norm(config, k_TKC, w["attention.k_norm"])
    if config.qk_norm == "all":
        q_norm, k_norm = w["attention.q_norm_all"], w["attention.k_norm_all"]
        q_TKGC = norm(config, q_TKGC.reshape(T, -1), q_norm.reshape(-1)).reshape(q_TKGC.shape)
        k_TKC = norm(config, k_TKC.reshape(T, -1), k_norm.reshape(-1)).reshape(k_TKC.shape)

    return rotate(config, layer, q_TKGC), rotate(config, layer, k_TKC), v_TKC


def latent_heads(
    config: ModelConfig, latent: Latent, layer: Layer, w: Weights, x_TD: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys, the last channels rotated, and values: a kv head for each query head."""

    def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + latent.norm_eps) * weight

    if latent.q_rank is None:
        q_TKC = np.einsum("td,dkc->tkc", x_TD, w["attention.q"])
    else:
        q_latent_TL = normed(x_TD @ w["attention.q_down"], w["attention.q_latent_norm"])
        q_TKC = np.einsum("tl,lkc->tkc", q_latent_TL, w["attention.q_up"])
    q_own_TKC, q_turning_TKC = np.split(q_TKC, [latent.nope_dim], axis=-1)
    q_TKC = np.concatenate([q_own_TKC, rotate(config, layer, q_turning_TKC)], axis=-1)

    kv_latent_TL, k_turning_TC = np.split(x_TD @ w["attention.kv_down"], [latent.kv_rank], axis=-1)
    kv_latent_TL = normed(kv_latent_TL, w["attention.kv_latent_norm"])
    kv_TKC = np.einsum("tl,lkc->tkc", kv_latent_TL, w["attention.kv_up"])
    k_own_TKC, v_TKU = np.split(kv_TKC, [latent.nope_dim], axis=-1)
    k_turned_TC = rotate(config, layer, k_turning_TC)
    k_TKC = np.stack(
        [np.concatenate([k_own_TKC[:, k], k_turned_TC], axis=-1) for k in range(config.num_heads)],
        axis=1,
    )
    return q_TKC[:, :, None], k_TKC, v_TKU


def rotate(config: ModelConfig, layer: Layer, x: np.ndarray) -> np.ndarray:
    """x [T, ..., C] with each pair of channels (i, i + C/2) turned by its position's angle."""
    inv_freq, factor = inverse_frequencies(layer.rope, config.rope_dim)
    angles = np.arange(len(x))[:, None] * inv_freq.astype(np.float64)
    turns = factor * np.exp(1j * angles).reshape(len(x), *[1] * (x.ndim - 2), -1)
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * turns
    return np.concatenate([turned.real, turned.imag], axis=-1)


def dense(config: ModelConfig, w: Weights, x_TD: np.ndarray) -> np.ndarray:
    hidden_T2F = np.einsum("td,dnf->tnf", x_TD, w["mlp.gate_up"])
    if config.mlp_bias:
        hidden_T2F = hidden_T2F + w["mlp.gate_up_bias"]
    y_TD = activate(config, hidden_T2F) @ w["mlp.down"]
    return y_TD + w["mlp.down_bias"] if config.mlp_bias else y_TD


def mixture(config: ModelConfig, w: Weights, x_TD: np.ndarray) -> np.ndarray:
    """Token by token, expert by expert."""
    experts = config.experts
    assert experts is not None
    y_TD = np.zeros_like(x_TD)
    if experts.shared_size:
        hidden_T2F = np.einsum("td,dnf->tnf", x_TD, w["moe.shared_gate_up"])
        y_TD = activate(config, hidden_T2F) @ w["moe.shared_down"]
    selection_bias_E = w["moe.selection_bias"] if experts.selection_bias else 0
    for t, x_D in enumerate(x_TD):
        scores_E = x_D @ w["moe.router"] + (w["moe.router_bias"] if experts.bias else 0)
        for e, share in route(experts, scores_E, selection_bias_E).items():
            hidden_2F = np.einsum("d,dnf->nf", x_D, w["moe.gate_up"][e])
            if experts.bias:
                hidden_2F = hidden_2F + w["moe.gate_up_bias"][e]
            y_D = activate(config, hidden_2F) @ w["moe.down"][e]
            if experts.bias:
                y_D = y_D + w["moe.down_bias"][e]
            y_TD[t] += share * y_D
    return y_TD


def route(
    experts: Experts, scores_E: np.ndarray, selection_bias_E: np.ndarray | int = 0
) -> dict[int, float]:
    """The chosen experts and their shares."""
    shares_E = sigmoid(scores_E) if experts.scoring == "sigmoid" else softmax(scores_E)
    rank_E = shares_E + selection_bias_E
    groups = np.split(np.arange(len(rank_E)), experts.num_groups)
    best_groups = sorted(groups, key=lambda group: -np.sort(rank_E[group])[-2:].sum())
    open_ = np.sort(np.concatenate(best_groups[: experts.top_groups]))
    chosen = open_[np.argsort(-rank_E[open_], kind="stable")][: experts.top_k]
    total = shares_E[chosen].sum() if experts.normalize else 1.0
    return {int(e): float(experts.scale * shares_E[e] / total) for e in chosen}


def activate(config: ModelConfig, hidden: np.ndarray) -> np.ndarray:
    """[..., 2, F] to [..., F]."""
    gate, up = hidden[..., 0, :], hidden[..., 1, :]
    match config.activation:
        case "silu":
            return gate * sigmoid(gate) * up
        case "gelu_tanh":
            return gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2 * up
        case ClampedSwiglu(alpha, limit):
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            return gate * sigmoid(alpha * gate) * (up + 1)


def norm(config: ModelConfig, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + config.norm_eps) * (weight + config.norm_offset)


def softcap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
