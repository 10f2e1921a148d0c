import io

import pytest

from serve.progress import Progress, Silent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_a_line_comes_every_few_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("loading", 4_000_000_000, stream=stream, clock=clock) as progress:
        for second in range(11):
            clock.now = second
            progress.update(second * 400_000_000, detail=f"layer {second}")
    assert stream.getvalue().splitlines() == [
        "loading: 50% of 4.0 GB, 400.0 MB/s, 5 s left, layer 5",
        "loading: 100% of 4.0 GB, 400.0 MB/s, layer 10",
        "loading: 4.0 GB in 10.0 s, 400.0 MB/s",
    ]


def test_a_total_may_come_later_or_never() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("compiling", unit="programs", stream=stream, clock=clock) as progress:
        clock.now = 6
        progress.advance()
        clock.now = 12
        progress.update(2, 8)
    assert stream.getvalue().splitlines() == [
        "compiling: 1 programs",
        "compiling: 25% of 8 programs, 36 s left",
        "compiling: 2 programs in 12.0 s",
    ]


def test_what_was_kept_from_an_earlier_start_does_not_shorten_what_is_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("compiling", 8, "programs", stream, clock) as progress:
        progress.update(3, kept=3)
        clock.now = 60
        progress.update(3, kept=3, detail="a")
        clock.now = 120
        progress.update(4, kept=3, detail="b")
        clock.now = 300
        progress.update(8, kept=3)
    assert stream.getvalue().splitlines() == [
        "compiling: 37% of 8 programs, a",
        "compiling: 50% of 8 programs, 8 min left, b",
        "compiling: 100% of 8 programs",
        "compiling: 8 programs in 300.0 s, 3 of them from an earlier start",
    ]


def test_work_that_failed_is_not_said_to_be_done() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("loading", 2, stream=stream):
        raise KeyError
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    clock = Clock()
    with Progress("loading", 2_000, stream=stream, clock=clock) as progress:
        clock.now = 5
        progress.update(1_000, detail="layer 3")
    assert "loading" in stream.getvalue()
    assert "200 B/s, 5 s left, layer 3" in stream.getvalue()
    assert stream.getvalue().endswith("loading: 1.0 kB in 5.0 s, 200 B/s\n")


def test_silent_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent("loading", 2) as progress:
        progress.advance()
    assert capsys.readouterr() == ("", "")
