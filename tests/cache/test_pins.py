"""Pins against a pool that is short of pages: what is pinned stays, all else can go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.keys import PageNames, root_key
from cache.pages import PagePool
from cache.pins import PinnedPages, PinsExceedBudget
from cache.prefix_index import ROOT

SIZE = 2
PROMPTS = ([1] * 8, [1] * 4 + [2] * 4, [3] * 6)


def names_of(tokens):
    names = PageNames(root_key(), SIZE)
    names.extend(tokens)
    return names


class Device:
    """A pool, its pins, and prompts that run and leave."""

    def __init__(self, num_pages=9, max_pinned=6):
        self.pool = PagePool(num_pages + 1, SIZE)
        self.pinned = PinnedPages(self.pool, max_pinned)

    def compute(self, tokens):
        """Pages of a request that has computed `tokens`, those that were there first."""
        names = names_of(tokens)
        found = self.pool.index.find(names.keys, 0, len(names))
        pages = self.pool.index.pages(names.keys[:found])
        self.pool.share(pages)
        pages += self.pool.allocate(len(names) - found)
        for number in range(found, len(names)):
            parent = pages[number - 1] if number else ROOT
            assert self.pool.index.add(names, number, pages[number], parent) == pages[number]
            self.pinned.named(names.keys[number])
        return pages

    def serve(self, tokens):
        self.pool.release(self.compute(tokens))

    def num_found(self, tokens):
        names = names_of(tokens)
        return self.pool.index.find(names.keys, 0, len(names))

    def evict_all(self):
        self.pool.release(self.pool.allocate(self.pool.num_free))

    def flush(self):
        self.pinned.let_go()
        return self.pool.flush()


@pytest.fixture
def device():
    return Device()


@pytest.mark.parametrize("computed_first", [True, False])
def test_pinned_pages_stay_until_they_are_unpinned(device, computed_first):
    keys = names_of(PROMPTS[0]).keys
    if computed_first:
        device.serve(PROMPTS[0])
    device.pinned.pin(keys)
    device.serve(PROMPTS[0])
    device.evict_all()
    assert device.num_found(PROMPTS[0]) == 4
    assert device.pool.num_used == 4
    device.pinned.unpin(keys)
    assert device.num_found(PROMPTS[0]) == 4, "they are kept as long as there is room"
    assert device.pool.num_used == 0
    device.evict_all()
    assert device.num_found(PROMPTS[0]) == 0


def test_what_two_have_pinned_stays_for_the_second(device):
    one, other = (names_of(prompt).keys for prompt in PROMPTS[:2])
    device.pinned.pin(one)
    device.pinned.pin(other)
    assert len(device.pinned) == 6, "what they have in common counts once"
    device.serve(PROMPTS[0])
    device.serve(PROMPTS[1])
    device.pinned.unpin(one)
    device.evict_all()
    assert device.num_found(PROMPTS[0]) == 2
    assert device.num_found(PROMPTS[1]) == 4


def test_more_than_the_budget_is_refused_whole_with_what_to_change(device):
    device.pinned.pin(names_of(PROMPTS[0]).keys)
    with pytest.raises(PinsExceedBudget, match=r"3 pages .* 4 already are, and 6 .* cache.pages"):
        device.pinned.pin(names_of(PROMPTS[2]).keys)
    assert len(device.pinned) == 4
    device.pinned.pin(names_of(PROMPTS[0]).keys)


def test_a_pool_of_one_request_keeps_none():
    with pytest.raises(PinsExceedBudget, match="0 of its 9 can be"):
        Device(max_pinned=-3).pinned.pin(names_of([1] * 2).keys)


def test_flushed_pages_are_free_and_kept_again_when_they_come_back(device):
    device.pinned.pin(names_of(PROMPTS[0]).keys)
    device.serve(PROMPTS[0])
    assert device.flush() == 4
    assert device.pool.num_free == device.pool.num_usable
    device.serve(PROMPTS[0])
    device.evict_all()
    assert device.num_found(PROMPTS[0]) == 4


STEPS = st.lists(
    st.tuples(st.sampled_from(["run", "leave", "pin", "unpin", "flush"]), st.integers(0, 9)),
    max_size=40,
)


@given(STEPS)
def test_no_history_loses_a_pinned_page_or_leaks_one(steps):
    device = Device()
    running, pins = [], []
    for step, number in steps:
        tokens = PROMPTS[number % 3][: 2 * (1 + number % 4)]
        keys = names_of(tokens).keys
        if step == "run" and device.pool.num_free >= len(keys):
            running.append(device.compute(tokens))
        elif step == "leave" and running:
            device.pool.release(running.pop(number % len(running)))
        elif step == "pin" and len({*keys}.union(*pins)) <= 6:
            device.pinned.pin(keys)
            pins.append(keys)
        elif step == "unpin" and pins:
            device.pinned.unpin(pins.pop(number % len(pins)))
        elif step == "flush" and not running:
            device.flush()
        wanted = {key for pinned in pins for key in pinned}
        assert len(device.pinned) == len(wanted)
        kept = {key for key in wanted if device.pool.index.page_of(key) is not None}
        device.evict_all()
        assert {key for key in wanted if device.pool.index.page_of(key) is not None} == kept
    for pages in running:
        device.pool.release(pages)
    for keys in pins:
        device.pinned.unpin(keys)
    assert device.pool.num_used == 0
    device.evict_all()
    assert len(device.pool.index) == 0
