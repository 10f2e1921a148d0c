"""Hints of requests: what they may say, and what is kept for how long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.retention import InvalidRetention, Retained, Retention

HOUR, MINUTES = 3600.0, 300.0


def keys(text):
    """Of a sequence's pages: its beginnings."""
    return [text[: end + 1].encode() for end in range(len(text))]


def test_a_page_is_kept_for_the_longest_time_of_those_that_stand_on_it():
    retention = Retention.parse([(4, "5m"), (9, "1h"), (10, "1h"), (16, "5m")], num_tokens=20)
    assert retention.page_ttls_s(page_size=4) == [HOUR, HOUR, MINUTES, MINUTES]


def test_a_page_that_a_breakpoint_is_in_is_not_kept():
    assert Retention.parse([(3, "5m")], num_tokens=3).page_ttls_s(page_size=4) == []
    assert Retention.parse([(7, "5m")], num_tokens=8).page_ttls_s(page_size=4) == [MINUTES]


def test_no_breakpoints_keep_nothing():
    assert Retention.parse([], num_tokens=8).page_ttls_s(page_size=4) == []


@given(st.data())
def test_the_time_of_each_page_is_that_of_an_obvious_search(data):
    positions = data.draw(st.sets(st.integers(1, 40), max_size=4).map(sorted))
    hints = [(position, data.draw(st.sampled_from(["5m", "1h"]))) for position in positions]
    size = data.draw(st.integers(1, 7))
    seconds = {"5m": MINUTES, "1h": HOUR}
    expected = []
    for end in range(size, 41, size):
        covering = [seconds[ttl] for position, ttl in hints if end <= position]
        if covering:
            expected.append(max(covering))
    assert Retention.parse(hints, num_tokens=40).page_ttls_s(size) == expected


@pytest.mark.parametrize(
    ("breakpoints", "words"),
    [
        ([(i, "5m") for i in range(1, 6)], "5 breakpoints; at most 4"),
        ([(0, "5m")], "at token 0 after 0"),
        ([(-1, "5m")], "at token -1"),
        ([(11, "5m")], "at token 11 .* 10 tokens"),
        ([(5, "5m"), (5, "1h")], "at token 5 after 5"),
        ([(5, "5m"), (4, "5m")], "at token 4 after 5"),
        ([(5, "10m")], "'10m'; it must be one of 5m, 1h"),
        ([(5, "")], "''; it must be one of 5m, 1h"),
    ],
)
def test_breakpoints_that_cannot_be_are_refused(breakpoints, words):
    with pytest.raises(InvalidRetention, match=words):
        Retention.parse(breakpoints, num_tokens=10)


def test_use_renews_and_the_end_comes_once():
    retained = Retained(10)
    ab = keys("ab")
    assert retained.keep(ab, [HOUR, MINUTES], 0.0) == ab
    assert retained.expire(299.0) == []
    retained.use(keys("abc"), 299.0)
    assert [retained.until_s(key) for key in keys("abc")] == [299 + HOUR, 299 + MINUTES, None]
    assert retained.expire(599.0) == [b"ab"]
    retained.use(ab, 600.0)
    assert retained.expire(599.0 + HOUR) == []
    assert retained.expire(600.0 + HOUR) == [b"a"]
    assert len(retained) == 0


def test_a_shorter_hint_renews_the_longer():
    retained = Retained(10)
    retained.keep(keys("a"), [HOUR], 0.0)
    assert retained.keep(keys("a"), [MINUTES], 100.0) == []
    assert retained.until_s(b"a") == 100.0 + HOUR


def test_what_is_over_is_not_renewed_by_use_but_by_a_hint():
    retained = Retained(10)
    retained.keep(keys("a"), [HOUR], 0.0)
    retained.use(keys("a"), HOUR)
    assert retained.until_s(b"a") == HOUR
    assert retained.keep(keys("a"), [MINUTES], HOUR) == []
    assert retained.expire(HOUR) == []
    assert retained.until_s(b"a") == HOUR + MINUTES


def test_what_is_refused_after_all_is_as_if_it_had_not_been_kept():
    retained = Retained(10)
    retained.keep(keys("ab"), [MINUTES] * 2, 0.0)
    retained.refuse(retained.keep(keys("abcd"), [MINUTES] * 4, 1.0))
    assert (len(retained), retained.num_refused) == (2, 2)
    assert retained.until_s(keys("abc")[-1]) is None
    assert retained.keep(keys("abc"), [MINUTES] * 3, 2.0) == keys("abc")[2:]
    assert retained.expire(2.0 + MINUTES) == keys("abc")


def test_where_there_is_no_room_the_end_of_a_sequence_is_refused_and_counted():
    retained = Retained(3)
    assert retained.keep(keys("abcdef"), [HOUR] * 5, 0.0) == keys("abc")
    assert retained.num_refused == 2
    assert retained.keep(keys("x"), [HOUR], 0.0) == []
    assert (len(retained), retained.num_refused) == (3, 3)
    retained.expire(HOUR)
    assert retained.keep(keys("x"), [HOUR], HOUR) == keys("x")


TEXTS = st.text("ab", min_size=1, max_size=5)
HINTS = st.lists(st.sampled_from([MINUTES, HOUR]), max_size=5).map(lambda ttls: sorted(ttls)[::-1])


@given(
    st.integers(1, 8),
    st.lists(
        st.tuples(st.sampled_from(["keep", "use", "expire"]), TEXTS, HINTS, st.integers(0, 2000))
    ),
)
def test_a_page_is_kept_as_long_as_those_that_stand_on_it(max_keys, steps):
    retained, now_s, kept = Retained(max_keys), 0.0, set()
    for step, text, ttls_s, later_s in steps:
        now_s += later_s
        if step == "keep":
            new = retained.keep(keys(text), ttls_s, now_s)
            assert kept.isdisjoint(new)
            kept.update(new)
        elif step == "use":
            retained.use(keys(text), now_s)
        else:
            over = retained.expire(now_s)
            assert len(set(over)) == len(over)
            kept.difference_update(over)
            assert all(retained.until_s(key) > now_s for key in kept)
        assert len(retained) == len(kept) <= max_keys
        for key in kept:
            if len(key) > 1:
                assert retained.until_s(key[:-1]) >= retained.until_s(key)
