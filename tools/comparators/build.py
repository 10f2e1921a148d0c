"""Builds others' kernels for Hopper, which the GPU report compares ours with.

    make comparators

Their sources come from their wheels, which are fetched once; a few lines of ours for each (xqa.cu,
fa3.cu, fa4.cu) let XLA call them. It does not know what they are called with
(`plan/comparator_trial.py`).
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from bench.peers.environment import PeerUnavailableError
from plan.comparator_trial import library
from plan.devices import Devices
from plan.kernels import measure
from plan.machine import ROOT
from tools.comparators.flash_attention4 import FLASH_ATTENTION4
from tools.comparators.flashinfer import FLASHINFER
from tools.comparators.source import BuildError, common_words

SOURCES = {**FLASHINFER, **FLASH_ATTENTION4}


def main() -> int:
    try:
        compiler = find_compiler()
        for name in SOURCES:
            build(name, compiler)
            made = library(name).relative_to(ROOT)
            print(f"{made}: a call compiles for an H200, to {launches(name)} launches", flush=True)
    except (BuildError, PeerUnavailableError) as error:
        print(f"comparators: {error}", file=sys.stderr)
        return 1
    return 0


def find_compiler() -> Path:
    """This Python's nvcc. Raises BuildError."""
    spec = find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    compilers = [path for folder in folders for path in Path(folder).glob("cu13/bin/nvcc")]
    if not compilers:
        raise BuildError(
            f"{sys.prefix} has no nvcc; make comparators builds with that of .venv-aot, which "
            "needs x86-64 Linux"
        )
    if shutil.which("g++") is None:
        raise BuildError("nvcc needs a compiler for the host, and there is no g++; install one")
    return compilers[0]


def build(name: str, compiler: Path) -> None:
    """Makes a library. Raises BuildError and PeerUnavailableError."""
    source, made = SOURCES[name], library(name)
    made.parent.mkdir(parents=True, exist_ok=True)
    output = made.with_suffix(".new")
    words = [*common_words(source.ours), *source.words(source.fetch())]
    command = [str(compiler), *words, f"--output-file={output}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"nvcc does not compile {made.name}:\n{done.stdout}{done.stderr}".strip())
    output.replace(made)


def launches(name: str) -> int:
    """Of a program with one call, compiled for a GPU that is not there. Raises BuildError."""
    outcome = measure(SOURCES[name].call, Devices("h200", 1))
    if fault := outcome.misfit or outcome.figures.get("fault"):
        raise BuildError(f"no program calls {library(name).name}: {fault}")
    return outcome.figures["num_kernels"]


if __name__ == "__main__":
    sys.exit(main())
