"""A Python environment for a peer, made once under a directory of the caller's choice.

Peers need packages and Pythons that Weft's own environment must not have. It knows no peer.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""What `import bench` needs on its path."""


class PeerUnavailableError(RuntimeError):
    """A peer that cannot be measured here; says why and what would help."""


def ensure_environment(
    directory: Path, version: str, installs: Sequence[Sequence[str]], search: str | None = None
) -> Path:
    """The Python of an environment with `installs` in it, one pip call for each, in their order.

    pip's output is in `directory`.log. `search` replaces PATH. Raises PeerUnavailableError.
    """
    python, done = directory / "bin" / "python", directory / "installed.json"
    wanted = [list(packages) for packages in installs]
    if not (done.is_file() and json.loads(done.read_text()) == wanted):
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        log = directory.with_name(f"{directory.name}.log")
        log.unlink(missing_ok=True)
        _run([str(find_python(version, search)), "-m", "venv", str(directory)], log)
        for packages in wanted:
            _run([str(python), "-m", "pip", "install", "--quiet", *packages], log)
        done.write_text(json.dumps(wanted))
    # A .pth comes after the environment's own packages; PYTHONPATH would come before them.
    (site_packages,) = directory.glob("lib/python*/site-packages")
    (site_packages / "weft_bench.pth").write_text(f"{ROOT}\n")
    return python


def find_python(version: str, search: str | None = None) -> Path:
    """A Python `version`, such as 3.11, that can make environments. Raises PeerUnavailableError.

    A pyenv shim on PATH fails unless its version is selected, so each candidate is run.
    """
    for candidate in _candidates(version, os.get_exec_path() if search is None else [search]):
        test = [str(candidate), "-c", "import ensurepip, venv"]
        if subprocess.run(test, capture_output=True).returncode == 0:
            return candidate
    raise PeerUnavailableError(
        f"there is no Python {version} with venv on PATH or under pyenv; "
        f"install one (pyenv install {version}, uv python install {version})"
    )


def _candidates(version: str, path: Sequence[str]) -> Iterator[Path]:
    for folder in path:
        if (candidate := Path(folder, f"python{version}")).is_file():
            yield candidate
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}*/bin/python{version}"))


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("a") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise PeerUnavailableError(
            f"`{' '.join(command[1:])}` ended with status {status}: "
            f"{lines[-1] if lines else 'no output'} (all of it: {log})"
        )
