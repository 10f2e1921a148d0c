"""Compiled steps kept from one start to the next, so that a later start neither traces nor lowers.

JAX's own cache spares a start the compiler, not the Python that leads to it, which on a CPU is most
of what is left. An entry is found by its program's key, so that a stale one is never met; one that
is damaged or another's is discarded with a warning, and its program is compiled again. It does not
know what decides a program (`serve/program_key.py`).
"""

import hashlib
import logging
import os
import pickle
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from model.step import StepShape
from serve.program_key import program_key
from serve.programs import Programs

log = logging.getLogger("weft")

FOLDER = "weft-steps"
SUFFIX = ".step"
MOST_BYTES = 2 << 30
"""All entries together; a step takes about a megabyte, a configuration some dozens of steps."""
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class CompiledStep:
    program: Any
    fallbacks: Sequence[tuple[str, str, str]]
    """What `note_fallback` was told while it was traced; kept, since tracing is what is spared."""


@dataclass(frozen=True)
class _Entry:
    executable: bytes
    in_tree: Any
    out_tree: Any
    fallbacks: Sequence[tuple[str, str, str]]


class ProgramCache:
    """A directory of compiled steps; processes may share it.

    A file holds the SHA-256 of what follows, the program's key, and a pickled _Entry.
    """

    def __init__(self, directory: Path, most_bytes: int = MOST_BYTES) -> None:
        """`directory` is made if it is not there. Raises PermissionError unless it is the user's
        own: to load an executable is to run it."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
            raise PermissionError(f"{directory} is another user's, or a link")
        if found.st_mode & 0o077:
            raise PermissionError(f"others may enter {directory}; chmod 700 it")
        self._directory = directory
        self._most_bytes = most_bytes

    def get(self, programs: Programs, shape: StepShape) -> CompiledStep | None:
        key = program_key(programs, shape)
        path = self._path(key)
        try:
            entry: _Entry = pickle.loads(_checked(path.read_bytes(), key))
            devices = list(programs.mesh.devices.flat)
            program = serialize_executable.deserialize_and_load(
                entry.executable,
                entry.in_tree,
                entry.out_tree,
                devices[0].client,
                devices,
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # XLA and pickle say in many ways what they can't read
            log.warning("discarding %s, and compiling its program again: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # what was used last is discarded last
        return CompiledStep(program, entry.fallbacks)

    def put(self, programs: Programs, shape: StepShape, step: CompiledStep) -> None:
        """Keeps it if that can be; if not, the log says why, and the next start compiles it."""
        key = program_key(programs, shape)
        try:
            entry = _Entry(*serialize_executable.serialize(step.program), step.fallbacks)
            self._write(self._path(key), bytes.fromhex(key) + pickle.dumps(entry))
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("a compiled program is not kept for the next start: %s", error)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}{SUFFIX}"

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._make_room()

    def _make_room(self) -> None:
        """What a killed process left half written counts, and goes, too."""
        with os.scandir(self._directory) as found:
            files = [(file.stat(), file.path) for file in found]
        excess = sum(status.st_size for status, _ in files) - self._most_bytes
        for status, path in sorted(files, key=lambda file: file[0].st_mtime):
            if excess <= 0:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= status.st_size


def beside_jax() -> ProgramCache | None:
    """The cache in the directory where JAX keeps its own; None where it keeps none.

    Warns where that is not for us to use.
    """
    directory = jax.config.jax_compilation_cache_dir
    if not (directory and jax.config.jax_enable_compilation_cache) or "://" in directory:
        return None
    try:
        return ProgramCache(Path(directory).absolute() / FOLDER)
    except OSError as error:
        log.warning("compiled programs are not kept for the next start: %s", error)
        return None


_jax_cache = threading.Lock()


@contextmanager
def jax_cache_off() -> Iterator[None]:
    """Makes JAX compile what it would have found in its own cache, while the context lasts.

    XLA for CPUs (jaxlib 0.11.2) serializes a program that came from there without its functions,
    which shows only once it is read again and run.
    """
    with _jax_cache:
        was_on = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX asks for the setting once
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", was_on)
            reset_cache()


def _checked(content: bytes, key: str) -> bytes:
    """The pickled entry. Raises ValueError unless it was written, whole, for `key`."""
    digest, rest = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != digest:
        raise ValueError("it is damaged")
    if rest[:DIGEST_BYTES] != bytes.fromhex(key):
        raise ValueError("it holds another program")
    return rest[DIGEST_BYTES:]
