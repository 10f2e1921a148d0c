"""Builds others' kernels for Hopper, which the GPU report compares ours with: FlashInfer's.

    make comparators

Their sources come from their wheel, which is fetched once; a few lines of ours (xqa.cu, fa3.cu) let
XLA call them. It does not know what they are called with (`plan/flashinfer_trial.py`).
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax

from bench.peers.environment import PeerUnavailableError, ensure_environment
from plan.devices import Devices
from plan.flashinfer_trial import GROUP_SIZE, HEAD_DIM, PAGE_SIZE, library
from plan.kernels import measure
from plan.kinds.kernel import Kernel
from plan.machine import ROOT

PACKAGE = "flashinfer-python==0.7.2.post1"


@dataclass(frozen=True)
class Source:
    """What a library is compiled of, and a call of it."""

    ours: str
    theirs: tuple[str, ...]
    """In csrc/xqa."""
    macros: Mapping[str, int]
    call: Kernel


# csrc/xqa/defines.h says what they mean.
XQA = {
    "BEAM_WIDTH": 1,
    "HEAD_ELEMS": HEAD_DIM,
    "HEAD_GRP_SIZE": GROUP_SIZE,
    "INPUT_FP16": 0,
    "LOW_PREC_OUTPUT": 0,
    "SLIDING_WINDOW": 0,
    "SPEC_DEC": 0,
    "TOKENS_PER_PAGE": PAGE_SIZE,
    "USE_CUSTOM_BARRIER": 1,
    "USE_INPUT_KV": 0,
}
SOURCES = {
    # Of bfloat16 pages FlashInfer gives Hopper the kernel that it has for Ampere.
    "xqa_bfloat16": Source(
        "xqa.cu",
        ("mha.cu",),
        {**XQA, "CACHE_ELEM_ENUM": 0},
        Kernel("decode_attention", "flashinfer"),
    ),
    "xqa_float8_e4m3fn": Source(
        "xqa.cu",
        ("mha_sm90.cu", "tensorMap.cpp"),
        {**XQA, "CACHE_ELEM_ENUM": 2},
        Kernel("decode_attention", "flashinfer", cache_dtype="float8_e4m3fn"),
    ),
    "fa3": Source(
        "fa3.cu",
        (),
        {"CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED": 1},
        Kernel("prefill_attention", "flashinfer", prompt=1024, context=0),
    ),
}


class BuildError(RuntimeError):
    """A comparator can't be built; says why and what would help."""


def main() -> int:
    try:
        compiler = find_compiler()
        flashinfer = fetch()
        for name in SOURCES:
            build(name, compiler, flashinfer)
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


def fetch() -> Path:
    """The folder of FlashInfer's sources. Raises PeerUnavailableError."""
    folder = ROOT / ".cache" / "comparators" / "flashinfer"
    # It is read, not run: without what it depends on, PyTorch above all.
    ensure_environment(folder, "3.12", [("--no-deps", "--no-compile", PACKAGE)])
    return folder / "lib" / "python3.12" / "site-packages" / "flashinfer" / "data"


def command(name: str, compiler: Path, flashinfer: Path, output: Path) -> list[str]:
    """What compiles a library."""
    source, xqa = SOURCES[name], flashinfer / "csrc" / "xqa"
    headers = (
        xqa,
        flashinfer / "include",
        flashinfer / "cutlass" / "include",
        flashinfer / "cccl" / "libcudacxx" / "include",
        jax.ffi.include_dir(),
    )
    return [
        str(compiler),
        "-shared",
        "-std=c++17",
        "--gpu-architecture=sm_90a",
        # As FlashInfer compiles them.
        "-O3",
        "-use_fast_math",
        "-DNDEBUG",
        "--expt-relaxed-constexpr",
        # They are of headers that are not ours.
        "--disable-warnings",
        # Nothing is asked of the machine that it runs on but its driver.
        "--cudart=static",
        # One library's names are another's, which is compiled for other pages.
        "--compiler-options=-fPIC,-fvisibility=hidden",
        *(f"-I{folder}" for folder in headers),
        *(f"-D{macro}={value}" for macro, value in source.macros.items()),
        str(Path(__file__).with_name(source.ours)),
        *(str(xqa / file) for file in source.theirs),
        f"--output-file={output}",
    ]


def build(name: str, compiler: Path, flashinfer: Path) -> None:
    """Makes a library. Raises BuildError."""
    made = library(name)
    made.parent.mkdir(parents=True, exist_ok=True)
    output = made.with_suffix(".new")
    words = command(name, compiler, flashinfer, output)
    done = subprocess.run(words, capture_output=True, text=True)
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
