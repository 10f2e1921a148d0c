"""How fast plain reads get a checkpoint's files, from the disk if the system lets go of its copies.

    python -m bench.disk CHECKPOINT [--keep]

prints the seconds they took. It does not know what is in the files.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

READERS = 8
"""Disks of servers are slow with one request at a time; more than as many gained nothing here."""
BLOCK_BYTES = 8 << 20
COLD = 0.05
"""As much of the files may still be in memory: small ones tend to stay, as do some pages."""
SAMPLES = 8
SETTLE_S = 3.0
"""Hosts of virtual machines take back what has just become free, in a second or two; then memory
is as hard to come by as for an engine, which imports for as long before it loads."""


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
    sizes = [path.stat().st_size for path in files]
    remaining = sum(size * _share_in_memory(path) for path, size in zip(files, sizes, strict=True))
    return remaining <= COLD * sum(sizes)


def read_apart_s(checkpoint: Path, keep: bool) -> float:
    """`read_s` in a process of its own, whose memory is as new as that of an engine that starts."""
    command = [sys.executable, "-m", "bench.disk", str(checkpoint.absolute())]
    done = subprocess.run(
        [*command, *(["--keep"] if keep else [])],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    return float(done.stdout)


def read_s(files: Sequence[Path], keep: bool = False) -> float:
    """Seconds that plain reads of them all take, READERS at once.

    With `keep` into memory as large as they are, as weights of CPU devices need it; without, into
    the same few blocks over and over.
    """
    own = threading.local()

    def block(size: int) -> np.ndarray:
        if keep:
            return np.empty(size, np.uint8)
        return vars(own).setdefault("block", np.empty(BLOCK_BYTES, np.uint8))

    def read(path: Path) -> np.ndarray:
        target = block(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            done = 0
            while num_bytes := file.readinto(target[done:]):
                done = done + num_bytes if keep else 0
        return target

    started = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        kept = list(pool.map(read, files))
    seconds = time.monotonic() - started
    del kept  # giving it back takes long, too, and is no part of reading
    return seconds


def _share_in_memory(path: Path) -> float:
    """Of SAMPLES of its bytes, those that can be read without waiting for the disk."""
    size, found = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file:
        for i in range(SAMPLES):
            try:
                place = i * size // SAMPLES
                found += os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:  # the file system can't say
                return 1.0
    return found / SAMPLES


if __name__ == "__main__":
    time.sleep(SETTLE_S)
    print(read_s(weight_files(Path(sys.argv[1])), keep="--keep" in sys.argv[2:]))
