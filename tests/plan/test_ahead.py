"""Things are made once, by whoever asks first, and ahead for those who will ask."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from plan.ahead import once, prepare, take
from plan.devices import Devices

CPU = Devices("cpu", 1)


@dataclass(frozen=True)
class Slow:
    name: str
    made: list[str]
    fails: bool = False

    def make(self) -> str:
        time.sleep(0.05)
        self.made.append(self.name)
        if self.fails:
            raise KeyError("it can't be made")
        return self.name

    def get(self) -> str:
        return once(("slow", self.name), self.make)

    def jobs(self, devices: Devices) -> Sequence[Callable[[], object]]:
        return [self.get]


def test_what_was_prepared_is_there_and_is_made_once() -> None:
    made: list[str] = []
    slow = [Slow(f"prepared {i}", made) for i in range(4)]
    prepare([*slow, "no kind that prepares"], CPU)
    assert sorted(made) == sorted(one.name for one in slow)
    assert [one.get() for one in slow] == [one.name for one in slow]
    assert len(made) == 4


def test_who_asks_while_it_is_made_waits_for_it() -> None:
    made: list[str] = []
    slow, found = Slow("shared", made), list[str]()
    threads = [threading.Thread(target=lambda: found.append(slow.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, found) == (["shared"], ["shared"] * 3)


def test_a_failure_is_told_to_who_asks_and_does_not_keep_the_others() -> None:
    made: list[str] = []
    prepare([Slow("failing", made, fails=True), Slow("fine", made)], CPU)
    with pytest.raises(KeyError, match="it can't be made"):
        Slow("failing", made, fails=True).get()
    assert Slow("fine", made).get() == "fine"
    assert sorted(made) == ["failing", "fine"]


def test_what_is_taken_is_let_go_of() -> None:
    made: list[str] = []
    slow = Slow("taken", made)
    slow.get()
    assert take(("slow", "taken"), slow.make) == "taken"
    slow.get()
    assert made == ["taken", "taken"]
