"""weft.json: what a converted directory holds, so that a reader needs to open nothing else first.

It does not know how the tensors are stored.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from model.checkpoint.source import CheckpointError

NAME = "weft.json"


class TensorRecord(BaseModel):
    """One tensor; `sha256` is over its bytes in C order, little-endian."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: str
    sha256: str


class Manifest(BaseModel):
    """The contents of weft.json; `tensors` by the names of `model/weights.py`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["weft-orbax"] = "weft-orbax"
    version: Literal[1] = 1
    architecture: str
    tensors: dict[str, TensorRecord]
    calibration_tokens: int | None = None
    """On how many tokens it was rounded; None: to nearest, or not at all."""

    def save(self, directory: Path) -> None:
        (directory / NAME).write_text(self.model_dump_json(indent=1, exclude_none=True) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        path = directory / NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"]) or "the file"
            raise CheckpointError(
                f"{path} is damaged or of another version of Weft: {where}: {first['msg']}; "
                "convert the original checkpoint again"
            ) from error
