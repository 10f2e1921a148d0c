"""Checkpoints on disk, Hugging Face safetensors and Orbax: read alike, converted into each other.

It does not know devices: `sharding` asks a TensorSource for the regions that each one holds.
"""

from pathlib import Path

from model.checkpoint import hugging_face, manifest
from model.checkpoint.hugging_face import HuggingFaceSource
from model.checkpoint.source import CheckpointError, Index, TensorSource, TensorSpec
from model.families import ignorable, read_model_config, weights

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
    expected = weights(config)
    if not converted:
        return HuggingFaceSource(
            directory,
            expected,
            ignorable=lambda name: ignorable(name, config),
            cache_bytes=cache_bytes,
        )
    # Orbax takes seconds to import, and brings JAX: only who reads its checkpoints waits for it.
    from model.checkpoint.orbax_store import OrbaxSource

    source = OrbaxSource(directory)
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    for weight in expected:
        if shapes.pop(weight.name, None) != weight.shape:
            raise CheckpointError(
                f"{directory / manifest.NAME} has no {weight.name} of shape {list(weight.shape)}, "
                "which config.json asks for; restore the config.json it was converted with"
            )
    if shapes:
        raise CheckpointError(
            f"{directory / manifest.NAME} lists {next(iter(shapes))}, of which config.json says "
            "nothing; restore the config.json it was converted with"
        )
    return source
