"""What fails is switched off, for longer each time, and said once for each reason."""

import logging

import pytest

from cache.tiers.breaker import FAILURES, FIRST_OFF_S, LONGEST_OFF_S, Breaker, reason_of
from tests.cache.tiers.fake_store import DISK_FULL


def test_few_failures_switch_nothing_off():
    breaker = Breaker("reading")
    for _ in range(FAILURES - 1):
        breaker.failed(OSError("x"), 0.0)
    assert not breaker.is_off(0.0)


def test_success_in_between_starts_the_count_again():
    breaker = Breaker("reading")
    for _ in range(5 * FAILURES):
        breaker.failed(OSError("x"), 0.0)
        breaker.succeeded()
    assert not breaker.is_off(0.0)


def test_each_further_failure_switches_off_for_twice_as_long_up_to_a_bound():
    breaker, now_s, times = Breaker("reading"), 100.0, []
    for _ in range(FAILURES - 1):
        breaker.failed(OSError("x"), now_s)
    for _ in range(30):
        breaker.failed(OSError("x"), now_s)
        since_s = now_s
        while breaker.is_off(now_s):
            now_s += FIRST_OFF_S
        times.append(now_s - since_s)
    assert times[:4] == [FIRST_OFF_S * 2**i for i in range(4)]
    assert max(times) == times[-1] == LONGEST_OFF_S


def test_what_was_under_way_when_it_was_switched_off_prolongs_nothing():
    breaker = Breaker("reading")
    for _ in range(10 * FAILURES):
        breaker.failed(OSError("x"), 0.0)
    assert not breaker.is_off(FIRST_OFF_S)


def test_each_reason_is_said_once(caplog: pytest.LogCaptureFixture):
    breaker = Breaker("writing to tier disk")
    with caplog.at_level(logging.WARNING, "weft"):
        for _ in range(5):
            breaker.failed(DISK_FULL, 0.0)
            breaker.failed(TimeoutError(), 0.0)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "writing to tier disk failed (ENOSPC)",
        "writing to tier disk failed (timeout)",
    ]
    assert breaker.reasons == {"ENOSPC": 5, "timeout": 5}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DISK_FULL, "ENOSPC"),
        (OSError(30, "Read-only file system"), "EROFS"),
        (PermissionError(13, "denied"), "EACCES"),
        (TimeoutError(), "timeout"),
        (ValueError("UNAVAILABLE: connection refused"), "UNAVAILABLE"),
        (ValueError("what?"), "ValueError"),
    ],
)
def test_reasons_are_few_words(error: Exception, reason: str):
    assert reason_of(error) == reason
