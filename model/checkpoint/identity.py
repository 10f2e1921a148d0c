"""Which weights a directory holds, told by a little of every file.

Two checkpoints of one architecture differ nearly everywhere, so samples tell them apart; a file
whose size and samples are another's is taken for it. It does not know formats.
"""

from hashlib import blake2b
from pathlib import Path

SAMPLES = 64
BLOCK_BYTES = 1 << 14
NO_WEIGHTS = {".json", ".jinja", ".md", ".model", ".py", ".txt"}
"""Of the directory's own files, those that say how to use the model; but for config.json."""
CONFIG = "config.json"


def identity(directory: Path) -> bytes:
    """16 bytes that differ where the configuration or the weights do, whatever the files' times."""
    found = blake2b(digest_size=16)
    files = (path for path in directory.rglob("*") if path.is_file())
    for path in sorted(files):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts):
            continue  # what downloaded it keeps its notes there
        if len(name.parts) == 1 and path.suffix in NO_WEIGHTS and path.name != CONFIG:
            continue
        size = path.stat().st_size
        found.update(f"{name.as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(max(0, size - BLOCK_BYTES) * i // (SAMPLES - 1))
                found.update(file.read(BLOCK_BYTES))
    return found.digest()
