"""Histograms against plain counting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.telemetry import SECONDS, Histogram, RequestClock, RequestTimes, Series, add_up

values = st.lists(st.floats(0, 10_000) | st.sampled_from(SECONDS))


@given(values)
def test_a_bucket_holds_what_is_no_larger_than_its_bound(observed: list[float]) -> None:
    histogram = Histogram()
    for value in observed:
        histogram.observe(value)
    bounds = [*SECONDS, float("inf")]
    for i, bound in enumerate(bounds):
        assert sum(histogram.counts[: i + 1]) == sum(value <= bound for value in observed)
    assert histogram.total == pytest.approx(sum(observed))


def test_an_observation_may_count_several_times() -> None:
    histogram = Histogram((1, 10))
    histogram.observe(2, times=3)
    assert (histogram.counts, histogram.total) == ([0, 3, 0], 6)


@given(values, values)
def test_replicas_add_up_to_one_that_saw_everything(
    first: list[float], second: list[float]
) -> None:
    def series(observed: list[float]) -> list[Series]:
        histogram = Histogram()
        for value in observed:
            histogram.observe(value)
        return [Series("a_seconds", histogram, {"phase": "x"}), Series("b_seconds", Histogram())]

    summed, expected = add_up([series(first), series(second)]), series([*first, *second])
    assert [(one.name, one.labels) for one in summed] == [(e.name, e.labels) for e in expected]
    assert summed[0].histogram.counts == expected[0].histogram.counts


def test_first_tokens_and_later_ones_are_told_apart() -> None:
    times, request = RequestTimes(), RequestClock(arrived_s=100.0)
    times.given(request, 4, now_s=103.0)
    times.given(request, 4, now_s=105.0)
    times.given(request, 1, now_s=106.0)
    times.served(request, now_s=107.0)
    first, between, whole = (one.histogram for one in times.series())
    assert (sum(first.counts), first.total) == (1, 3.0)
    # Four tokens after two seconds are four intervals of half a second.
    assert (sum(between.counts), between.total) == (5, 3.0)
    assert between.counts[SECONDS.index(0.5)] == 4
    assert (sum(whole.counts), whole.total) == (1, 7.0)
