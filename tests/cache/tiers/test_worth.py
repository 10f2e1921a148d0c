"""The rule: a tier is used only when it is faster than computing."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.worth import LARGEST, LAST, REFUSALS, Worth


def test_unmeasured_tier_is_endlessly_slow_and_is_to_be_probed():
    worth = Worth()
    assert worth.fetch_s("disk", 1) == inf
    assert not worth.decide(1, "disk", 1e9)
    assert worth.probe_due("disk")


def test_unmeasured_prefill_is_endlessly_fast():
    worth = Worth()
    worth.observe_fetch("disk", 1, 0.0, 0.001)
    assert worth.recompute_s([5.0]) == [0.0]
    assert not worth.decide(1, "disk", 0.0)


def test_prefill_is_the_median_of_what_was_measured():
    worth = Worth()
    for seconds in (2.0, 4.0, 100.0):
        worth.observe_prefill(2.0, seconds)
    worth.observe_prefill(0.0, 7.0)
    assert worth.recompute_s([1.0, 10.0]) == [2.0, 20.0]


def test_faster_way_is_taken():
    worth = Worth()
    worth.observe_fetch("disk", 8, 0.0, 0.8)
    assert worth.decide(8, "disk", 0.81)
    assert not worth.decide(8, "disk", 0.8)


def test_tier_whose_first_page_comes_too_late_is_not_used():
    """Waiting for it must cost little where it comes to nothing."""
    worth = Worth(most_lost=0.05)
    worth.observe_fetch("disk", 8, 0.1, 0.2)
    assert not worth.decide(8, "disk", 1.9)
    assert worth.decide(8, "disk", 2.1)


def test_outliers_decide_nothing():
    worth = Worth()
    for seconds in [0.1] * 4 + [inf] * 3:
        worth.observe_fetch("disk", 1, 0.0, seconds)
    assert worth.fetch_s("disk", 1) == 0.1


def test_only_the_last_measurements_count():
    worth = Worth()
    for seconds in [inf] * 20 + [0.1] * LAST:
        worth.observe_fetch("disk", 1, 0.0, seconds)
    assert worth.fetch_s("disk", 1) == 0.1


@given(
    st.floats(0, 1),
    st.floats(0.0001, 1),
    st.integers(1, 64),
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
)
def test_other_sizes_do_not_flatter(latency_s: float, page_s: float, asked: int, measured: list):
    """A tier that takes a latency and a time for each page is taken for as slow, but for half of
    the latency, since sizes are classes in which the largest is twice the smallest."""
    worth = Worth()
    for num_pages in measured:
        worth.observe_fetch("disk", num_pages, 0.0, latency_s + page_s * num_pages)
    # The least it may say; a thousandth for rounding.
    assert worth.fetch_s("disk", asked) * 1.001 >= latency_s / 2 + page_s * asked


@given(st.integers(LARGEST, 10 * LARGEST), st.integers(LARGEST, 10 * LARGEST))
def test_beyond_the_largest_size_each_page_takes_as_much(asked: int, measured: int):
    worth = Worth()
    worth.observe_fetch("disk", measured, 0.0, 0.5 * measured)
    assert worth.fetch_s("disk", asked) == pytest.approx(0.5 * asked)


def test_tiers_are_apart():
    worth = Worth()
    worth.observe_fetch("disk", 1, 0.0, 0.1)
    assert worth.fetch_s("object", 1) == inf


def test_losing_tier_is_probed_now_and_then_and_can_win_again():
    worth = Worth()
    worth.observe_fetch("disk", 4, 0.0, inf)
    due = []
    for _ in range(REFUSALS):
        assert not worth.decide(4, "disk", 1.0)
        due.append(worth.probe_due("disk"))
    assert due == [False] * (REFUSALS - 1) + [True]
    for _ in range(2):
        worth.observe_fetch("disk", 4, 0.0, 0.1)
        assert not worth.probe_due("disk")
    assert worth.decide(4, "disk", 1.0)
