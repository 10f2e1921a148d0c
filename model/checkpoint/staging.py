"""Directories that appear under their name whole or not at all.

It does not know what is in them.
"""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from model.checkpoint.source import CheckpointError


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A directory beside `destination` that takes its name, flushed to disk, when the block ends.

    If the block fails, the directory is removed; if the process is killed, the next call with the
    same `destination` removes it. A lock, which dies with its process, tells the two apart.
    """
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists; remove it or choose another destination")
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{destination.name}.incomplete-"
    for leftover in destination.parent.glob(glob.escape(prefix) + "*"):
        with _locked(leftover) as locked:
            if not locked:
                raise CheckpointError(f"{destination} is being written by another process")
            shutil.rmtree(leftover)
    directory = destination.parent / f"{prefix}{secrets.token_hex(4)}"
    directory.mkdir()
    with _locked(directory):
        try:
            yield directory
            _flush(directory)
            os.rename(directory, destination)
            _flush_entry(destination.parent)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold the lock of `directory`; False where another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _flush(directory: Path) -> None:
    for parent, _, files in os.walk(directory):
        for name in files:
            _flush_entry(Path(parent) / name)
        _flush_entry(Path(parent))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
