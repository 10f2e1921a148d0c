"""Runs another engine's process once and takes its figures.

It knows of the engine a command: JSON on its stdin, where the parent's end is seen too, and JSON as
the last line of its stdout.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan.devices import Devices
from plan.kinds.kind import Outcome
from plan.kinds.peer import Peer
from plan.models import FOLDER

COMMAND = (sys.executable, "-m", "bench.peers.transformers_gpu_worker")
TAIL_LINES = 3


class PeerFailed(RuntimeError):
    """A peer that gave no figures; says what it last wrote."""


def measure(peer: Peer, devices: Devices) -> Outcome:
    """Raises PeerFailed."""
    if devices.described:
        raise PeerFailed(f"peers are measured on devices that run, and {devices} is described")
    asked = asdict(peer) | {
        "config": str(FOLDER / f"{peer.model}.toml"),
        "device": "cuda" if devices.platform == "gpu" else "cpu",
    }
    return Outcome(_ask(asked, peer.limit_s))


def _ask(asked: dict[str, Any], limit_s: float) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process:
            try:
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
                # Its stdin stays open: once it closes, the peer ends itself.
                status = process.wait(limit_s)
            except (BrokenPipeError, subprocess.TimeoutExpired) as error:
                process.kill()
                # Closing sends what could not be written.
                with suppress(BrokenPipeError):
                    process.stdin.close()
                late = isinstance(error, subprocess.TimeoutExpired)
                raise PeerFailed(
                    f"it gave no figures within {limit_s:g} s" if late else _last_words(log)
                ) from None
            lines = process.stdout.read().splitlines()
        if status or not lines:
            raise PeerFailed(_last_words(log))
        return json.loads(lines[-1])


def _last_words(log: Any) -> str:
    log.seek(0)
    return " | ".join(log.read().strip().splitlines()[-TAIL_LINES:]) or "it wrote nothing"
