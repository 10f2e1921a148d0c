"""Measure the peak memory of converting a checkpoint that is much larger than that memory.

    python -m bench.convert_memory [--layers 16] [--directory DIR]

Writes a random Llama of at least 4 GB in float32 (it needs three times its size of free disk, given
back at the end), converts it to Orbax and back to Hugging Face, each in a process of its own, and
prints for each the peak against the bound that the conversion promises:

    1 GiB + 2 x the largest weight, as Weft holds it (q, k and v in one; gate and up in one)

The peak is the process's ru_maxrss: all its resident pages, the interpreter and libraries included.
What the kernel caches of the files is not in it, since they are read and written, not mapped.
Exits 1 if a bound is exceeded. It says nothing about device memory.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCAB, HIDDEN, MLP, HEADS, KV_HEADS = 32_000, 2048, 8192, 16, 8
WEIGHTS = {
    "embedding": VOCAB * HIDDEN,
    "attention.qkv": HIDDEN * (HEADS + 2 * KV_HEADS) * (HIDDEN // HEADS),
    "attention.out": HIDDEN * HIDDEN,
    "mlp.gate_up": HIDDEN * 2 * MLP,
    "mlp.down": MLP * HIDDEN,
    "head": HIDDEN * VOCAB,
}
ITEM_BYTES = 4
MIN_BYTES = 4_000_000_000
GIB = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the peak memory of weft convert.")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    num_values = sum(size * (args.layers if "." in name else 1) for name, size in WEIGHTS.items())
    num_bytes = num_values * ITEM_BYTES
    if num_bytes < MIN_BYTES:
        sys.exit(f"{args.layers} layers are {num_bytes:,} bytes; {MIN_BYTES:,} are asked for")
    free = shutil.disk_usage(args.directory).free
    if free < 3.1 * num_bytes:
        sys.exit(f"{args.directory} has {free:,} bytes free, {3.1 * num_bytes:,.0f} are needed")

    bound = GIB + 2 * max(WEIGHTS.values()) * ITEM_BYTES
    print(f"checkpoint {num_bytes / GIB:.2f} GiB, bound {bound / GIB:.2f} GiB")
    within = True
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        original, orbax, back = (f"{scratch}/{name}" for name in ("original", "orbax", "back"))
        _run(
            *("-m", "tools.random_checkpoint", original, "--layers", str(args.layers)),
            *("--vocab", str(VOCAB), "--hidden", str(HIDDEN), "--mlp", str(MLP)),
            *("--heads", str(HEADS), "--kv-heads", str(KV_HEADS)),
        )
        for source, destination, to in ((original, orbax, "orbax"), (orbax, back, "hf")):
            call = f"convert({source!r}, {destination!r}, to={to!r})"
            peak, seconds = _run("-c", f"from model.checkpoint.convert import convert; {call}")
            within &= peak <= bound
            rate = num_bytes / seconds / 1e6
            print(f"to {to:5}  peak {peak / GIB:.2f} GiB  {seconds:.0f} s  {rate:.0f} MB/s")
    print("within the bound" if within else "EXCEEDS THE BOUND")
    return 0 if within else 1


def _run(*arguments: str) -> tuple[int, float]:
    """Peak resident bytes and seconds of a Python process, which must succeed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], env=environment)
    # Not `wait`: this also gives the resources that this child used, and no other.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed")
    return usage.ru_maxrss * 1024, time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
