"""Host memory: within its budget, and what leaves is handed on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.counts import Decisions
from cache.tiers.host import HostTier
from tests.cache.tiers.fake_store import IMAGE_BYTES, image, key, keys


@given(st.lists(st.integers(0, 9)), st.integers(0, 5))
def test_every_page_is_held_or_handed_on_and_never_more_than_fit(history: list, capacity: int):
    host = HostTier(capacity * IMAGE_BYTES, IMAGE_BYTES)
    held: set[int] = set()
    for number in history:
        gone = host.put(key(number), image(key(number)))
        held.add(number)
        held -= {int.from_bytes(other, "big") for other, _ in gone}
        assert all(content == image(other) for other, content in gone)
        assert len(held) == host.report(Decisions()).num_pages <= capacity
        assert all(host.peek(key(other)) == image(key(other)) for other in held)


def test_without_room_a_page_is_handed_on_at_once():
    host = HostTier(0, IMAGE_BYTES)
    assert host.put(key(1), image(key(1))) == [(key(1), image(key(1)))]


def test_pinned_page_is_not_handed_on():
    host = HostTier(2 * IMAGE_BYTES, IMAGE_BYTES)
    host.pin(keys(1))
    for one in keys(4):
        host.put(one, image(one))
    assert [host.holds(one) for one in keys(4)] == [True, False, False, True]


def test_clearing_leaves_what_is_pinned():
    host = HostTier(3 * IMAGE_BYTES, IMAGE_BYTES)
    for one in keys(3):
        host.put(one, image(one))
    host.pin([key(1)])
    host.clear()
    assert host.newest_first() == [(key(1), image(key(1)))]
    host.put(key(5), image(key(5)))
    host.put(key(6), image(key(6)))
    assert host.holds(key(1))


def test_image_of_another_length_is_refused():
    with pytest.raises(ValueError, match="an image of 3 bytes; this tier's have 128"):
        HostTier(1000, IMAGE_BYTES).put(key(1), b"abc")
