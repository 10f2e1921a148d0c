"""Write a Hugging Face checkpoint of random weights, of any size, for measurements.

    python -m tools.random_checkpoint OUT --arch llama --hidden 768 --mlp 2048 --layers 12 \\
        --heads 12 --kv-heads 4 --vocab 32000 --dtype float32 --seed 0

It holds one tensor in memory at a time. The same arguments give the same bytes. There is no
tokenizer: prompt with token ids.
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint.cast import DTYPES
from model.checkpoint.hugging_face import HuggingFaceWriter, tensor_shapes
from model.checkpoint.source import TensorSpec
from model.checkpoint.staging import staged
from model.families import read_config, weights

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def write_random_checkpoint(
    directory: Path, config: dict[str, Any], dtype: str, seed: int = 0
) -> None:
    """Write the checkpoint that `config`, the contents of its config.json, describes."""
    shapes = tensor_shapes(weights(read_config(config)))
    specs = {name: TensorSpec(shape, DTYPES[dtype]) for name, shape in shapes.items()}
    with staged(directory) as incomplete:
        (incomplete / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with HuggingFaceWriter(incomplete, specs) as writer:
            for name, spec in specs.items():
                writer.write(name, _random(name, spec, seed))


def _random(name: str, spec: TensorSpec, seed: int) -> np.ndarray:
    """Values that keep activations near unit size through any depth; seeded by name, not order."""
    if name.endswith("norm.weight"):
        return np.ones(spec.shape, spec.dtype)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(spec.shape, np.float32)
    values *= spec.shape[-1] ** -0.5  # [out, in]
    return values.astype(spec.dtype)


def make_config(args: argparse.Namespace) -> dict[str, Any]:
    """The config.json of the command line's model, as transformers writes it."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[args.arch]],
        "model_type": args.arch,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": args.head_dim or args.hidden // args.heads,
        "hidden_act": "silu",
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "max_position_embeddings": args.context,
        "num_attention_heads": args.heads,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": args.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": args.tie,
        "torch_dtype": args.dtype,
        "vocab_size": args.vocab,
    }
    if args.arch == "mixtral":
        config |= {"num_local_experts": args.experts, "num_experts_per_tok": args.top_k}
    if args.arch == "qwen3_moe":
        config |= {
            "num_experts": args.experts,
            "num_experts_per_tok": args.top_k,
            "moe_intermediate_size": args.mlp,
            "norm_topk_prob": True,
        }
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument(
        "--mlp", type=int, default=2048, help="feed-forward width, of an expert too"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, help="hidden / heads unless given")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2, help="experts for each token")
    parser.add_argument("--tie", action="store_true", help="the head is the embedding")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_random_checkpoint(args.out, make_config(args), args.dtype, args.seed)


if __name__ == "__main__":
    main()
