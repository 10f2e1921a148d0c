"""How fast plain reads get a checkpoint's files, from the disk if the system lets go of its copies.

It does not know what is in the files.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

READERS = 8
"""Disks of servers are slow with one request at a time; more than as many gained nothing here."""
BLOCK_BYTES = 8 << 20


def weight_files(checkpoint: Path) -> list[Path]:
    """What loading reads: a converted checkpoint's arrays, or the safetensors."""
    converted = checkpoint / "weights"
    if converted.is_dir():
        return sorted(path for path in converted.rglob("*") if path.is_file())
    return sorted(checkpoint.glob("*.safetensors"))


def forget(files: Sequence[Path]) -> bool:
    """Asks the system to drop its copies in memory; whether it did, so that reads are cold."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is yet to be written can't be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(_in_memory(path) for path in files)


def read_s(files: Sequence[Path]) -> float:
    """Seconds that plain reads of them all take, READERS at once, into the same memory."""
    own = threading.local()

    def read(path: Path) -> None:
        block = vars(own).setdefault("block", bytearray(BLOCK_BYTES))
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass

    started = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, files):
            pass
    return time.monotonic() - started


def _in_memory(path: Path) -> bool:
    """Whether a page in its middle can be read without waiting for the disk."""
    middle = path.stat().st_size // 2
    with closing(os.fdopen(os.open(path, os.O_RDONLY), "rb", buffering=0)) as file:
        try:
            return bool(os.preadv(file.fileno(), [bytearray(1)], middle, os.RWF_NOWAIT))
        except BlockingIOError:
            return False
        except OSError:  # the file system can't say
            return True
