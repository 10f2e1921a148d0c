"""The giving side of a transfer: what may be read, and when."""

import pytest

from cache.transfers.sending import Sending


def sending(window=2, first=3, last=8):
    return Sending(first, last, lambda number, image: None, window)


def test_only_what_is_computed_and_the_receiver_has_room_for_is_read():
    some = sending()
    assert some.readable(3) == range(3, 3)
    assert some.readable(4) == range(3, 4)
    assert some.readable(100) == range(3, 5)
    some.read(some.readable(100))
    assert some.is_blocked
    assert not some.readable(100)
    some.taken(1)
    assert not some.is_blocked
    assert some.readable(100) == range(5, 6)


def test_it_is_over_when_the_last_is_read():
    some = sending(window=9)
    some.read(some.readable(7))
    assert not some.is_over
    some.read(some.readable(9))
    assert some.next == 8
    assert some.is_over


def test_a_receiver_cannot_take_what_it_was_not_sent_nor_give_back():
    some = sending()
    some.taken(100)
    assert some.readable(100) == range(3, 5)
    some.read(range(3, 5))
    some.taken(2)
    some.taken(1)
    assert some.readable(100) == range(5, 7)


def test_whoever_ended_it_is_sent_nothing_more():
    some = sending()
    some.end()
    assert some.is_over
    assert not some.readable(100)


def test_a_page_that_is_lost_ends_it_and_is_told():
    told = []
    some = Sending(0, 3, lambda number, image: None, on_lost=lambda: told.append("lost"))
    some.lose()
    assert some.is_over
    assert told == ["lost"]


@pytest.mark.parametrize(("first", "last"), [(3, 3), (4, 3), (-1, 3)])
def test_no_pages_are_not_sent(first, last):
    with pytest.raises(ValueError, match="ask for one or more"):
        Sending(first, last, lambda number, image: None)
