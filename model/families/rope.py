"""The spellings of rotary embedding in config.json.

Transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. What the
frequencies are is `model/rope.py`'s business.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from model.config import LinearScaling, Llama3Scaling, Rope, YarnScaling
from model.families.keys import Keys, UnsupportedModel

ROPE_TYPES = ("default", "linear", "llama3", "yarn")

DEFAULTS = {
    "rope_type": "default",
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
"""What transformers assumes where a file says nothing."""


def read_rope(keys: Keys, types: Collection[str] = ROPE_TYPES) -> Rope:
    """The one rotary embedding of a model, which must be of one of `types`."""
    return parse_rope(keys, *_parameters(keys), types)


def query_scale(keys: Keys) -> float:
    """DeepSeek's factor on attention's scale: what mscale_all_dim asks of queries and of keys."""
    parameters, where = _parameters(keys)
    rope = Keys(keys.architecture, parameters, DEFAULTS, f"{where}.")
    mscale_all = rope.optional_number("mscale_all_dim")
    return _correction(rope.number("factor"), mscale_all) ** 2 if mscale_all else 1.0


def _parameters(keys: Keys) -> tuple[Mapping[str, Any], str]:
    """What both releases of transformers write, put together, and the key to name in errors."""
    theta = keys.number("rope_theta")
    old = dict(keys.mapping("rope_scaling"))
    new = keys.mapping("rope_parameters")
    if new and keys.given("rope_theta"):
        old["rope_theta"] = theta
    if clash := [key for key in old if key in new and old[key] != new[key]]:
        raise UnsupportedModel(
            f"{keys.architecture}: config.json has {clash[0]} = {old[clash[0]]!r} but "
            f"rope_parameters.{clash[0]} = {new[clash[0]]!r}; keep rope_parameters alone"
        )
    where = "rope_parameters" if new else "rope_scaling"
    return {"rope_theta": theta} | old | dict(new), where


def parse_rope(
    keys: Keys, parameters: Mapping[str, Any], where: str, types: Collection[str] = ROPE_TYPES
) -> Rope:
    """The rotary embedding that the object at key `where` describes."""
    context = {"original_max_position_embeddings": keys.size("max_position_embeddings")}
    rope = Keys(keys.architecture, parameters, DEFAULTS | context, f"{where}.")
    kind = rope.text("rope_type", "type")
    if kind not in types:
        raise rope.refusal("rope_type" if rope.given("rope_type") else "type", ", ".join(types))
    scaling = SCALINGS[kind](rope)
    theta = rope.number("rope_theta")
    rope.finish(inert=(), off={"partial_rotary_factor": (1.0, None)})
    return Rope(theta, scaling)


def _linear(rope: Keys) -> LinearScaling:
    return LinearScaling(rope.number("factor"))


def _llama3(rope: Keys) -> Llama3Scaling:
    return Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context=rope.size("original_max_position_embeddings"),
    )


def _yarn(rope: Keys) -> YarnScaling:
    return YarnScaling(
        factor=rope.number("factor"),
        beta_fast=rope.number("beta_fast"),
        beta_slow=rope.number("beta_slow"),
        original_context=rope.size("original_max_position_embeddings"),
        attention_factor=_yarn_attention_factor(rope),
        truncate=rope.flag("truncate"),
    )


def _yarn_attention_factor(rope: Keys) -> float:
    """As written, else by the paper's equation 15, which DeepSeek's mscale keys generalise."""
    factor = rope.number("factor")
    written = rope.optional_number("attention_factor")
    mscale, mscale_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if written is not None:
        return written
    if mscale and mscale_all:
        return _correction(factor, mscale) / _correction(factor, mscale_all)
    return _correction(factor, 1.0)


def _correction(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


SCALINGS = {"default": lambda rope: None, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
