"""Environments for peers, with a shell script in the place of Python and pip."""

from pathlib import Path

import pytest

from bench.peers.environment import ROOT, PeerUnavailableError, ensure_environment, find_python

PYTHON = """#!/bin/sh
case "$1 $2" in
"-c "*) exit 0 ;;
"-m venv")
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"
    cp "$0" "$3/bin/python" ;;
"-m pip")
    echo "$@" >> "{calls}"
    case "$*" in *absent*) echo "no distribution matches absent"; exit 1 ;; esac ;;
esac
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """On PATH: a Python whose pip calls are written to `calls`."""
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    write(tmp_path / "path" / "python3.11", PYTHON.format(calls=tmp_path / "calls"))
    return tmp_path


def write(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


def ensure(folder: Path, *installs: tuple[str, ...]) -> Path:
    return ensure_environment(folder / "peers" / "x", "3.11", installs, str(folder / "path"))


def test_packages_are_installed_in_order_and_once(folder):
    for _ in range(2):
        assert ensure(folder, ("first==1",), ("second", "third")).is_file()
    calls = (folder / "calls").read_text().splitlines()
    assert calls == ["-m pip install --quiet first==1", "-m pip install --quiet second third"]


def test_environment_of_other_packages_is_made_anew(folder):
    ensure(folder, ("first==1",))
    python = ensure(folder, ("first==2",))
    assert (folder / "calls").read_text().splitlines()[1:] == ["-m pip install --quiet first==2"]
    assert python.is_file()


def test_bench_can_be_imported_after_the_environments_own_packages(folder):
    ensure(folder)
    (pth,) = (folder / "peers" / "x").glob("lib/python3.11/site-packages/*.pth")
    assert Path(pth.read_text().strip()) == ROOT


def test_failed_install_says_what_pip_said_and_is_tried_again(folder):
    for _ in range(2):
        with pytest.raises(PeerUnavailableError, match="status 1: no distribution matches absent"):
            ensure(folder, ("absent",))
    assert len((folder / "calls").read_text().splitlines()) == 2


def test_python_that_does_not_run_is_passed_over_for_one_of_pyenv(tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    write(tmp_path / "path" / "python3.11", "#!/bin/sh\nexit 127\n")
    real = write(tmp_path / "pyenv" / "versions" / "3.11.7" / "bin" / "python3.11", PYTHON)
    assert find_python("3.11", str(tmp_path / "path")) == real


def test_missing_python_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(PeerUnavailableError, match=r"no Python 3\.11 .*pyenv install 3\.11"):
        find_python("3.11", str(tmp_path))
