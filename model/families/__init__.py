"""How each Hugging Face family's config.json and tensors become the one decoder's.

One file for each family; nothing outside this folder knows their spellings. It does not read
tensors (`model/checkpoint`).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.config import ModelConfig, Quantization
from model.families import deepseek
from model.families.decoder import DEFAULTS, Family, token_ids
from model.families.gemma import GEMMA2, GEMMA3
from model.families.gpt_oss import GPT_OSS
from model.families.keys import Keys, UnsupportedModel
from model.families.llama import LLAMA
from model.families.mistral import MISTRAL
from model.families.mixtral import MIXTRAL
from model.families.olmo import OLMO2
from model.families.phi import PHI3
from model.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from model.families.tensors import weights_from
from model.families.unread import INERT, OFF
from model.weights import QUANTIZED_DTYPES, Weight

__all__ = [
    "FAMILIES",
    "UnsupportedModel",
    "declare_quantization",
    "ignorable",
    "read_config",
    "read_model_config",
    "weights",
]

FAMILIES = {
    family.architecture: family
    for family in (
        deepseek.DEEPSEEK_V3,
        GEMMA2,
        GEMMA3,
        GPT_OSS,
        LLAMA,
        MISTRAL,
        MIXTRAL,
        OLMO2,
        PHI3,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
    )
}


OUR_METHOD = "weft"
"""quant_method in the config.json of what we quantized."""


def read_model_config(directory: Path) -> ModelConfig:
    """The model in `directory`, whose generation_config.json, if any, says how generation ends."""
    config = read_config(_read_json(directory / "config.json"))
    if not (directory / "generation_config.json").is_file():
        return config
    generation = _read_json(directory / "generation_config.json")
    bos_id = generation.get("bos_token_id")
    return replace(
        config,
        bos_id=config.bos_id if bos_id is None else bos_id,
        eos_ids=token_ids(generation.get("eos_token_id")) or config.eos_ids,
    )


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes, as transformers 4 or 5 writes it.

    Raises UnsupportedModel for whatever in it would change the output and is not computed here.
    """
    family = _family(config)
    keys = Keys(family.architecture, config, {**DEFAULTS, **family.defaults})
    quantization = _quantization(keys)
    model = replace(family.read(keys), quantization=quantization)
    keys.finish(INERT, OFF)
    return model


def declare_quantization(quantization: Quantization) -> Mapping[str, str]:
    """What `weft convert --quantize` writes into config.json, as its quantization_config."""
    return {"quant_method": OUR_METHOD, "weights": quantization}


def weights(config: ModelConfig) -> list[Weight]:
    """Every weight of the model, in the order in which a forward pass meets them.

    Of a quantized model, those that it was made of: no family has scales.
    """
    return weights_from(replace(config, quantization=None), FAMILIES[config.architecture].tensors)


def ignorable(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold tensor `name` though no weight is made of it."""
    tied_head = config.tie_embeddings and name == "lm_head.weight"
    inv_freq = name.endswith(".rotary_emb.inv_freq")
    return tied_head or inv_freq or deepseek.predicts_further_tokens(name, config)


def _quantization(keys: Keys) -> Quantization | None:
    found = keys.any("quantization_config")
    if not found:
        return None
    for quantization in QUANTIZED_DTYPES:
        if found == declare_quantization(quantization):
            return quantization
    raise keys.refusal(
        "quantization_config",
        "null, and what weft convert --quantize writes; use a checkpoint of unquantised weights",
    )


def _family(config: Mapping[str, Any]) -> Family:
    """By the first of `architectures`, or by `model_type` where the file names none."""
    named, model_type = config.get("architectures"), config.get("model_type")
    if named:
        asked, family = named[0], FAMILIES.get(named[0])
    else:
        by_type = {family.model_type: family for family in FAMILIES.values()}
        asked, family = f"model_type {model_type!r}", by_type.get(str(model_type))
    if family is None:
        raise UnsupportedModel(f"{asked} is not supported; supported: {', '.join(FAMILIES)}")
    if model_type not in (None, family.model_type):
        raise UnsupportedModel(
            f"{family.architecture}: config.json has model_type = {model_type!r}; "
            f"supported: {family.model_type!r}"
        )
    return family


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UnsupportedModel(f"{path} does not exist; a model directory holds config.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UnsupportedModel(f"{path} holds a {type(found).__name__}, not an object")
    return found
