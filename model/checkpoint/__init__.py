"""Checkpoints on disk, Hugging Face safetensors and Orbax: read alike, converted into each other.

It does not know devices: `sharding` asks a TensorSource for the regions that each one holds.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model.checkpoint import hugging_face, manifest
from model.checkpoint.hugging_face import HuggingFaceSource
from model.checkpoint.source import CheckpointError, Index, TensorSource, TensorSpec
from model.config import ModelConfig
from model.families import ignorable, read_model_config, weights
from model.weights import QUANTIZED_DTYPES, quantized, shapes

__all__ = ["CheckpointError", "Index", "TensorSource", "TensorSpec", "open_checkpoint"]


def open_checkpoint(
    directory: Path | str, *, cache_bytes: int = hugging_face.CACHE_BYTES
) -> TensorSource:
    """The checkpoint in `directory`, converted or Hugging Face, checked against its config.json.

    `cache_bytes` is host memory for weights packed from Hugging Face's tensors, so that several
    devices' regions of one weight cost one packing. Raises CheckpointError saying what is wrong.
    """
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {problem}; give the directory of a checkpoint")
    converted = (directory / manifest.NAME).is_file()
    if not converted:
        hugging_face.require_weights(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json, which says what its weights are")
    config = read_model_config(directory)
    if not converted:
        if config.quantization:
            raise CheckpointError(
                f"{directory / 'config.json'} says that its weights are quantized by Weft, and "
                f"there is no {manifest.NAME}; convert the original checkpoint again"
            )
        return HuggingFaceSource(
            directory,
            weights(config),
            ignorable=lambda name: ignorable(name, config),
            cache_bytes=cache_bytes,
        )
    # Orbax takes seconds to import, and brings JAX: only who reads its checkpoints waits for it.
    from model.checkpoint.orbax_store import OrbaxSource

    source = OrbaxSource(directory)
    _check(directory / manifest.NAME, source.specs, config)
    return source


def _check(file: Path, specs: Mapping[str, TensorSpec], config: ModelConfig) -> None:
    """That the tensors `file` lists are those of the model."""
    remedy = "restore the config.json it was converted with, or convert again"
    expected = shapes(config)
    for name, shape in expected.items():
        if name not in specs or specs[name].shape != shape:
            raise CheckpointError(
                f"{file} has no {name} of shape {list(shape)}, which config.json asks for; {remedy}"
            )
    for name in specs:
        if name not in expected:
            raise CheckpointError(
                f"{file} lists {name}, of which config.json says nothing; {remedy}"
            )
    if config.quantization is None:
        return
    for name in quantized(config):
        stored = {name: QUANTIZED_DTYPES[config.quantization], f"{name}_scale": np.dtype("float32")}
        for tensor, dtype in stored.items():
            if specs[tensor].dtype != dtype:
                raise CheckpointError(
                    f"{file} has {tensor} as {specs[tensor].dtype}, and quantization to "
                    f"{config.quantization} asks for {dtype}; {remedy}"
                )
