"""Where figures were taken, and with which sources.

It knows the host alone; devices are JAX's to name (`plan/worker.py`).
"""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

MEASURED = (
    *(f"{package}/**/*.py" for package in ("model", "sharding", "cache", "serve", "plan")),
    "bench/peers/*.py",
    "configs/models/*.toml",
    "configs/hardware/*.toml",
)
"""What decides a figure, beside the experiment itself."""


def cores() -> str:
    """The processor, and how many of its cores we may use."""
    return f"{len(os.sched_getaffinity(0))} cores of {cpu_model()}"


def sources(root: Path = ROOT) -> str:
    """The commit that is checked out; with changes, or without git, a digest of the files too.

    So figures of one state of the sources are never taken for another's.
    """
    commit = git(root, "rev-parse", "--short", "HEAD")
    if commit and not git(root, "status", "--porcelain", "--", *(f":(glob){g}" for g in MEASURED)):
        return commit
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MEASURED for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{commit or 'no commit'}+{digest.hexdigest()[:8]}"


def cpu_model() -> str:
    """Linux names it in a file that platform.processor() does not read."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(directory: Path, *arguments: str) -> str:
    """Empty where git, a repository or an answer is missing."""
    try:
        found = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
