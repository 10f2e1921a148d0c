"""`weft convert`."""

from pathlib import Path
from typing import Literal

from model.checkpoint.convert import convert
from model.config import Quantization
from serve.progress import Progress


def run(
    source: Path,
    destination: Path,
    dtype: str | None,
    quantization: Quantization | None,
    to: Literal["orbax", "hf"],
) -> None:
    """Prints the new directory."""
    with Progress(f"converting {source.name}, twice: write and verify") as progress:
        convert(
            source,
            destination,
            dtype=dtype,
            quantization=quantization,
            to=to,
            progress=progress.update,
        )
    print(destination)
