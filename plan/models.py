"""The models that experiments name: shapes without weights, from configs/models/NAME.toml.

Such a file is a model's config.json in TOML, read by the model's family as a checkpoint's would be.
It does not know meshes, or where real weights might lie, and imports no JAX.
"""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Literal

from model.config import ModelConfig
from model.families import UnsupportedModel, read_config
from plan.unknown import unknown

FOLDER = Path(__file__).parents[1] / "configs" / "models"


class UnknownModel(ValueError):
    """A model that has no file, or whose file can't be read; says which could."""


def model_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_model(
    name: str,
    num_layers: int | None = None,
    quantization: Literal["none", "int8", "fp8"] = "none",
) -> ModelConfig:
    """The model of configs/models/NAME.toml; with `num_layers`, its first layers alone."""
    if name not in (names := model_names()):
        raise UnknownModel(unknown("model", name, names))
    model = read_model(FOLDER / f"{name}.toml")
    if quantization != "none":
        model = replace(model, quantization=quantization)
    if num_layers is None:
        return model
    if not 1 <= num_layers <= model.num_layers:
        raise UnknownModel(f"{name} has {model.num_layers} layers; its first {num_layers} asked")
    return replace(model, layers=model.layers[:num_layers])


def read_model(path: Path) -> ModelConfig:
    try:
        return read_config(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnsupportedModel) as error:
        raise UnknownModel(f"{path}: {error}") from error
