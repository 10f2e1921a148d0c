"""A peer is a command that is told a task and answers with figures, or does not."""

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from plan import peers
from plan.devices import Devices
from plan.kinds.peer import Peer
from plan.peers import PeerFailed

CPU = Devices("cpu", 1)
PEER = Peer("transformers-compiled", "tiny", concurrency=2, prompt=8, output=4, limit_s=20.0)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch):
    """Lets a peer be lines of Python, which find what they were asked as `asked`."""

    def be(*lines: str) -> None:
        code = ["import json, os, sys", "asked = json.loads(sys.stdin.readline())", *lines]
        monkeypatch.setattr(peers, "COMMAND", (sys.executable, "-c", "\n".join(code)))

    return be


def test_a_peer_is_told_the_same_shapes_and_its_last_line_is_its_figures(answers) -> None:
    answers("print('a library greets')", "print(json.dumps(asked | {'total_s': 2.5}))")
    figures = PEER.measure(CPU, None).figures
    assert figures["total_s"] == 2.5
    names = ("engine", "concurrency", "prompt", "output", "dtype")
    assert {name: figures[name] for name in names} == {name: getattr(PEER, name) for name in names}
    assert figures["config"].endswith("configs/models/tiny.toml")
    assert figures["device"] == "cpu"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import no_such_engine", "No module named 'no_such_engine'"),
        ("os.write(2, b'out of memory'); os._exit(9)", "out of memory"),
        ("sys.exit(0)", "it wrote nothing"),
    ],
)
def test_a_peer_without_figures_is_told_by_its_last_words(answers, line: str, said: str) -> None:
    answers(line)
    with pytest.raises(PeerFailed, match=said):
        PEER.measure(CPU, None)


def test_a_peer_that_died_before_it_was_told_is_told_by_its_last_words(monkeypatch) -> None:
    def start_and_wait(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        process = popen(*arguments, **options)
        process.wait()
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start_and_wait)
    monkeypatch.setattr(peers, "COMMAND", (sys.executable, "-c", "raise SystemExit('no licence')"))
    with pytest.raises(PeerFailed, match="no licence"):
        PEER.measure(CPU, None)


def test_a_peer_that_takes_too_long_is_ended(answers, tmp_path) -> None:
    answers(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))", "sys.stdin.read()")
    started = time.monotonic()
    with pytest.raises(PeerFailed, match=r"no figures within 0\.5 s"):
        replace(PEER, limit_s=0.5).measure(CPU, None)
    assert time.monotonic() - started < 10


def test_a_peers_stdin_stays_open_while_it_works_so_that_it_sees_our_end(answers) -> None:
    answers(
        "import select",
        "closed = select.select([sys.stdin], [], [], 0.2)[0]",
        "print(json.dumps({'closed': bool(closed)}))",
    )
    assert PEER.measure(CPU, None).figures == {"closed": False}


def test_the_worker_is_there_to_be_run() -> None:
    """Its packages are not ours, so what can be seen here is that it gets as far as them."""
    with pytest.raises(PeerFailed, match="No module named 'torch'"):
        PEER.measure(CPU, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": 0}, "output is 0; it must be 1 or more"),
        ({"limit_s": 0.0}, "limit_s is 0.0; it must be seconds, above 0"),
        ({"model": "tinny"}, "there is no model tinny"),
    ],
)
def test_senseless_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PEER, **changes)


def test_devices_that_are_not_there_have_no_peers() -> None:
    with pytest.raises(PeerFailed, match="h200:1 is described"):
        PEER.measure(Devices("h200", 1), None)
