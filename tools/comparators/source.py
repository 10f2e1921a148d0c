"""What another's kernel is built of. It does not know who wrote it, nor what compiles it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import jax

from plan.kinds.kernel import Kernel

FOLDER = Path(__file__).parent


class BuildError(RuntimeError):
    """A comparator can't be built; says why and what would help."""


@dataclass(frozen=True)
class Source(ABC):
    ours: str
    """The file beside this one that lets XLA call it."""
    call: Kernel
    """One that it is for."""

    @abstractmethod
    def fetch(self) -> Path:
        """Where what others made of it is, which is fetched once.

        Raises bench.peers.environment.PeerUnavailableError.
        """

    @abstractmethod
    def words(self, fetched: Path) -> list[str]:
        """What nvcc is told of it beside `ours`. Raises BuildError."""


def common_words(ours: str) -> list[str]:
    """What nvcc is told of each."""
    return [
        "-shared",
        "-std=c++17",
        "--gpu-architecture=sm_90a",
        "-O3",
        "-DNDEBUG",
        # They are of headers that are not ours.
        "--disable-warnings",
        # Nothing is asked of the machine that it runs on but its driver.
        "--cudart=static",
        # One library's names are another's, which is compiled for other pages.
        "--compiler-options=-fPIC,-fvisibility=hidden",
        "--linker-options=-Bsymbolic",
        f"-I{jax.ffi.include_dir()}",
        str(FOLDER / ours),
    ]
