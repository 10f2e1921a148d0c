"""A fetch by itself: order, read-ahead, and when waiting ends."""

from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.counts import Miss
from cache.tiers.fetch import READ_AHEAD, Fetch
from tests.cache.tiers.fake_store import image, keys


def fetch_of(num_pages: int, page_s: float = 1.0, most_lost_s: float = 0.5) -> Fetch:
    recompute_s = [page_s * (i + 1) for i in range(num_pages)]
    return Fetch(keys(num_pages), ["disk"] * num_pages, recompute_s, 10.0, most_lost_s)


@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_pages_are_taken_in_order_up_to_the_first_miss(order: list, missing: set):
    fetch, taken = fetch_of(6), []
    for number in order:
        outcome = Miss.ABSENT if number in missing else image(keys(6)[number])
        fetch.accept(number, outcome, 11.0)
        taken += fetch.take(1000)
        assert taken == [(one, image(one)) for one in keys(6)[: len(taken)]]
    assert fetch.done()
    assert len(taken) == min(missing, default=6)


def test_no_more_pages_are_asked_for_than_are_read_ahead():
    fetch = fetch_of(READ_AHEAD + 2)
    asked = [fetch.next_to_read(10.0) for _ in range(READ_AHEAD + 1)]
    assert asked == [*range(READ_AHEAD), None]
    fetch.accept(1, b"b", 11.0)
    assert [fetch.next_to_read(11.0) for _ in range(2)] == [READ_AHEAD, None]
    fetch.accept(0, b"a", 11.0)
    assert [fetch.next_to_read(11.0) for _ in range(2)] == [READ_AHEAD + 1, None]


def test_pages_that_are_there_are_not_asked_for():
    fetch = fetch_of(4)
    fetch.accept(0, b"a", 10.0)
    fetch.accept(2, b"c", 10.0)
    assert [fetch.next_to_read(10.0) for _ in range(3)] == [1, 3, None]


def test_waiting_ends_when_computing_the_rest_is_faster():
    """At every moment what was lost is within the bound, whatever arrives when."""
    fetch = fetch_of(10, page_s=2.0, most_lost_s=1.0)
    assert fetch.give_up_at_s == 11.0
    fetch.accept(0, b"a", 10.9)
    assert fetch.give_up_at_s == 13.0
    fetch.accept(2, b"c", 11.0)
    assert fetch.give_up_at_s == 13.0
    fetch.accept(1, b"b", 12.0)
    assert fetch.give_up_at_s == 17.0


def test_what_arrived_before_it_was_abandoned_can_be_taken():
    fetch = fetch_of(3)
    fetch.accept(0, b"a", 10.1)
    fetch.abandon()
    fetch.accept(1, b"b", 10.2)
    assert fetch.done()
    assert fetch.is_abandoned
    assert fetch.take(1000) == [(keys(1)[0], b"a")]


def test_what_was_done_is_not_abandoned():
    fetch = fetch_of(1)
    fetch.accept(0, b"a", 10.1)
    fetch.abandon()
    assert not fetch.is_abandoned


def test_cancelled_fetch_is_done_and_gives_nothing():
    fetch = fetch_of(2)
    fetch.accept(0, b"a", 10.1)
    fetch.cancel()
    fetch.accept(1, b"b", 10.2)
    assert fetch.done()
    assert fetch.take(1000) == []
    assert fetch.next_to_read(10.2) is None


def test_spans_say_what_a_tier_took():
    fetch = Fetch(keys(3), ["host", "disk", "disk"], [1.0, 2.0, 3.0], 10.0, 0.5)
    fetch.accept(0, b"a", 10.0)
    for now_s in (10.1, 10.2):
        fetch.next_to_read(now_s)
    fetch.accept(2, b"c", 10.5)
    fetch.accept(1, b"b", 10.7)
    assert list(fetch.spans) == ["disk"]
    span = fetch.spans["disk"]
    assert (span.started_s, span.arrived_s) == (10.1, [10.5, 10.7])
