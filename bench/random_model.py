"""Checkpoints of random weights for measurements, written once.

It does not know what is measured.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.measure import Tell
from bench.peers.environment import ROOT


def random_model(options: Mapping[str, str | int], cache: Path, tell: Tell) -> Path:
    """The directory of a model of `options`, those of tools/random_checkpoint.

    It is written under `cache` if need be. Raises ValueError outside a checkout.
    """
    directory = cache / "bench" / "-".join(map(str, options.values()))
    if (directory / "config.json").is_file():
        return directory
    if not (ROOT / "tools" / "random_checkpoint.py").is_file():
        raise ValueError(
            "no MODEL is named, and what makes a random one, tools/random_checkpoint.py, is not "
            "installed; name a model directory, or run from a checkout of Weft"
        )
    tell(f"writing a random model to {directory}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "tools.random_checkpoint", str(directory.absolute())]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True)
    return directory
