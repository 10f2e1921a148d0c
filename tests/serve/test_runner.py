"""What is told while programs are compiled; the rest of the runner is tested by engines."""

import threading
import time

import pytest

from serve import runner as runner_module
from serve.runner import Runner, _describe
from tests.serve.harness import DENSE, make_parts, random_weights


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Nothing is compiled: `_compile` is the tests'."""
    monkeypatch.setattr(runner_module, "TELL_S", 0.01)
    return make_parts(DENSE, random_weights(DENSE)).runner


def test_compiling_tells_what_is_at_hand_and_how_much_is_done_before_it_is(runner, monkeypatch):
    told: list[tuple[str, int, int]] = []
    several = threading.Event()
    names = {_describe(shape) for shape in runner.shapes}

    def compile_one(shape: object) -> bool:
        assert several.wait(10), "it is told more than once while the first program takes long"
        return shape == runner.shapes[0]

    def progress(name: str, done: int, kept: int) -> None:
        told.append((name, done, kept))
        if len(told) == 3:
            several.set()

    monkeypatch.setattr(runner, "_compile", compile_one)
    runner.compile_all(progress)
    assert told[0] == (_describe(runner.shapes[0]), 0, 0)
    assert told[-1] == ("", len(names), 1)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert {name for name, _, _ in told} <= names | {""}


def test_a_program_that_does_not_compile_ends_the_start_without_the_others(runner, monkeypatch):
    begun: list[object] = []

    def compile_one(shape: object) -> bool:
        begun.append(shape)
        if shape == runner.shapes[0]:
            raise MemoryError("no room to compile")
        time.sleep(0.05)
        return False

    monkeypatch.setattr(runner, "_compile", compile_one)
    with pytest.raises(MemoryError, match="no room to compile"):
        runner.compile_all()
    assert len(begun) < len(runner.shapes)
