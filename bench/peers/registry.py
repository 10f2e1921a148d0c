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


PEERS = {
    "transformers": Peer(
        "bench.peers.transformers_worker",
        "3.11",
        # PyTorch first: a build of it for the CPU, where pip knows one, is then kept.
        (("torch==2.13.0",), ("transformers==5.23.0", "numpy")),
    )
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
