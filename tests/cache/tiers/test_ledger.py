"""The ledger, driven with random histories beside a slow list of pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.pins import PinsExceedBudget
from cache.tiers.ledger import Ledger
from tests.cache.tiers.fake_store import key, keys

PAGE_BYTES = 100


def filled(capacity: int, num_pages: int) -> Ledger:
    ledger = Ledger("disk", capacity * PAGE_BYTES, PAGE_BYTES)
    for one in keys(num_pages):
        ledger.enter(one)
    return ledger


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["come", "evict", "leave", "use", "pin", "unpin", "settle"]),
        st.integers(0, 9),
    ),
    max_size=60,
)


@given(STEPS, st.integers(0, 6))
def test_budget_is_kept_and_the_least_recently_used_goes_first(steps: list, capacity: int):
    ledger = Ledger("disk", capacity * PAGE_BYTES + PAGE_BYTES // 2, PAGE_BYTES)
    held: list[int] = []
    """Least recently used first."""
    pins = [0] * 10
    leaving = 0
    for step, number in steps:
        if step == "come" and number not in held and ledger.reserve():
            ledger.release()
            ledger.enter(key(number))
            held.append(number)
        elif step == "evict":
            expected = [other for other in held if not pins[other]][:1]
            assert ledger.evict(1) == [key(other) for other in expected]
            held = [other for other in held if other not in expected]
            leaving += len(expected)
        elif step == "leave":
            assert ledger.leave(key(number)) == (number in held)
            if number in held:
                held.remove(number)
                leaving += 1
        elif step == "use" and number in held:
            ledger.use([key(number)])
            held.sort(key=lambda other: other == number and not pins[other])
        elif step == "pin":
            try:
                ledger.pin([key(number)])
                pins[number] += 1
                assert sum(map(bool, pins)) <= capacity
            except PinsExceedBudget:
                assert not pins[number]
                assert sum(map(bool, pins)) + 1 > capacity
        elif step == "unpin" and pins[number]:
            ledger.unpin([key(number)])
            pins[number] -= 1
            if not pins[number]:  # it was of use until now
                held.sort(key=lambda other: other == number)
        elif step == "settle" and leaving:
            ledger.release()
            leaving -= 1
        assert len(ledger) == len(held)
        assert all((key(other) in ledger) == (other in held) for other in range(10))
        assert ledger.num_free == capacity - len(held) - leaving >= 0


def test_sequence_that_was_used_goes_from_its_end():
    ledger = filled(4, 4)
    ledger.use(keys(3))
    assert ledger.evict(4) == [key(3), key(2), key(1), key(0)]


def test_room_of_a_page_that_left_is_free_once_it_is_gone():
    ledger = filled(1, 1)
    ledger.evict(1)
    assert not ledger.reserve()
    ledger.release()
    assert ledger.reserve()


def test_page_that_is_pinned_before_it_comes_stays():
    ledger = filled(2, 0)
    ledger.pin([key(1)])
    ledger.enter(key(1))
    ledger.enter(key(2))
    assert ledger.evict(2) == [key(2)]


def test_page_pinned_twice_stays_until_the_second_unpin():
    ledger = filled(1, 1)
    ledger.pin(keys(1))
    ledger.pin(keys(1))
    ledger.unpin(keys(1))
    assert ledger.evict(1) == []
    ledger.unpin(keys(1))
    assert ledger.evict(1) == keys(1)


def test_pinning_more_than_the_budget_is_refused_in_bytes_and_pins_nothing():
    ledger = filled(3, 3)
    ledger.pin(keys(2))
    with pytest.raises(PinsExceedBudget, match=r"3 pages .* 2 already are, .* 200 bytes"):
        ledger.pin([key(1), key(5), key(6), key(7)])
    assert ledger.num_pinned == 2
    ledger.unpin(keys(2))
    assert ledger.num_pinned == 0


def test_negative_budget_is_refused():
    with pytest.raises(ValueError, match="the budget of tier disk is -1 bytes; 0 is the least"):
        Ledger("disk", -1, 1)
