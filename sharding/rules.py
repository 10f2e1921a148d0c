"""The one table that says how every array is cut over the mesh.

It does not say when devices talk (`collectives.py`).
"""

from jax.sharding import PartitionSpec as P

from sharding.mesh import STAGE, TENSOR

VOCAB = (STAGE, TENSOR)
"""Cut over all devices of a replica: no stage holds the embedding for the others."""

WEIGHTS: dict[str, P] = {
    "embedding": P(VOCAB, None),
    "head": P(None, VOCAB),
    "final_norm": P(),
    "attention.qkv": P(None, TENSOR),
    "attention.qkv_scale": P(TENSOR),
    "attention.qkv_bias": P(TENSOR),
    "attention.q": P(None, TENSOR),
    "attention.q_scale": P(TENSOR),
    "attention.q_down": P(),
    "attention.q_down_scale": P(),
    "attention.q_latent_norm": P(),
    "attention.q_up": P(None, TENSOR),
    "attention.q_up_scale": P(TENSOR),
    "attention.kv_down": P(),
    "attention.kv_down_scale": P(),
    "attention.kv_latent_norm": P(),
    "attention.kv_up": P(None, TENSOR),
    "attention.kv_up_scale": P(TENSOR),
    "attention.q_norm": P(),
    "attention.k_norm": P(),
    "attention.q_norm_all": P(TENSOR),
    "attention.k_norm_all": P(TENSOR),
    "attention.sinks": P(TENSOR),
    "attention.out": P(TENSOR),
    "attention.out_scale": P(),
    "attention.out_bias": P(),
    "attention.inv_freq": P(),
    "attention.rope_factor": P(),
    "attention.window": P(),
    "mlp.gate_up": P(None, None, TENSOR),
    "mlp.gate_up_scale": P(None, TENSOR),
    "mlp.gate_up_bias": P(None, TENSOR),
    "mlp.down": P(TENSOR),
    "mlp.down_scale": P(),
    "mlp.down_bias": P(),
    "moe.router": P(),
    "moe.router_bias": P(),
    "moe.gate_up": P(TENSOR),
    "moe.gate_up_scale": P(TENSOR),
    "moe.gate_up_bias": P(TENSOR),
    "moe.down": P(TENSOR),
    "moe.down_scale": P(TENSOR),
    "moe.down_bias": P(TENSOR),
    "moe.selection_bias": P(),
    "moe.shared_gate_up": P(None, None, TENSOR),
    "moe.shared_gate_up_scale": P(None, TENSOR),
    "moe.shared_down": P(TENSOR),
    "moe.shared_down_scale": P(),
    "attention_norm": P(),
    "attention_post_norm": P(),
    "mlp_norm": P(),
    "mlp_post_norm": P(),
}
"""By a weight's name in `model/weights.py`, without its layer."""

PAGES = P(STAGE, None, None, TENSOR)
"""A layer slot's K or V pages: [stages, pages, page_size, kv_heads, head_dim or value_dim]; of
int8 pages the scales, too, without the last axis."""

REPLICATED = P()
"""What every device holds whole: slot state, the step's packed metadata, sampled tokens."""


def weight_spec(name: str) -> P:
    """The cut of weight `name`; a layer's weights are stacked over stages in front."""
    if not name.startswith("layers."):
        return WEIGHTS[name]
    return P(STAGE, *WEIGHTS[name.split(".", 2)[2]])
