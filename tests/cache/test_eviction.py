"""Which page goes first, where a page is a number."""

import random

import pytest

import cache.eviction
from cache.eviction import AGE_POWER, EvictionOrder


def order_of(pages: list[int], depths: list[int] | None = None, **settings) -> EvictionOrder:
    """Of pages that were computed in that order and may all go."""
    order = EvictionOrder(64, 16, **settings)
    for page, depth in zip(pages, depths or [0] * len(pages), strict=True):
        order.begin(page, depth)
        order.wait(page)
    return order


def evicted(order: EvictionOrder, count: int) -> list[int]:
    return [order.evict() for _ in range(count)]


def use(order: EvictionOrder, *pages: int) -> None:
    order.leave(pages)
    order.use(pages)
    for page in pages:
        order.wait(page)


def test_of_pages_that_are_alike_the_one_used_longest_ago_goes_first():
    assert evicted(order_of([3, 1, 2]), 3) == [3, 1, 2]
    order = order_of([3, 1, 2])
    use(order, 3, 1, 2)
    use(order, 3)
    assert evicted(order, 3) == [1, 2, 3]


def test_page_that_left_does_not_go():
    order = order_of([1, 2, 3])
    order.leave([1])
    assert evicted(order, 1) == [2]
    order.wait(1)
    assert evicted(order, 2) == [1, 3]
    with pytest.raises(AssertionError, match="no page waits"):
        order.evict()


def test_page_that_waits_twice_goes_once():
    order = order_of([1, 2])
    order.leave([1])
    order.wait(1)
    assert evicted(order, 2) == [1, 2]
    with pytest.raises(AssertionError, match="no page waits"):
        order.evict()


@pytest.mark.parametrize(("dear", "kept"), [(1.5**AGE_POWER, False), (4.0**AGE_POWER, True)])
def test_page_that_costs_more_stays_until_it_is_as_much_older(dear, kept):
    """It is 20 pages old when the other is 10."""
    order = EvictionOrder(64, 16, cost=lambda position: dear if position else 1.0)
    order.begin(1, depth=1)
    for page in range(2, 12):
        order.begin(page, depth=0)
    for page in range(12, 21):
        order.begin(page, depth=0)
    order.wait(1)
    order.wait(11)
    assert order.evict() == (11 if kept else 1)


def test_page_of_a_sort_that_is_asked_for_again_stays_longer():
    """Pages used twice are asked for again, pages used once never."""
    order = EvictionOrder(64, 16)
    for page in range(1, 41):
        order.begin(page, 0)
        order.wait(page)
    for _ in range(8):
        use(order, *range(1, 5))
        for page in evicted(order, 8):
            order.begin(page, 0)
            order.wait(page)
    assert not {1, 2, 3, 4} & set(evicted(order, 30))


def test_pages_read_once_drive_out_less_of_what_is_used_than_by_age_alone():
    rng, num_pages = random.Random(0), 100
    order, hot_missed, oldest_missed = EvictionOrder(num_pages, 16), 0, 0
    page_of: dict[int, int] = {}
    by_age: dict[int, None] = {}
    for i in range(2000):
        # Of 20 five are used, then 25 that are not used again.
        for item in [*rng.sample(range(20), 5), *range(100 + 25 * i, 125 + 25 * i)]:
            oldest_missed += item < 20 and item not in by_age
            by_age.pop(item, None)
            by_age[item] = None
            if len(by_age) > num_pages:
                del by_age[next(iter(by_age))]
            if item in page_of:
                use(order, page_of[item])
                continue
            hot_missed += item < 20
            page = len(page_of) if len(page_of) < num_pages else order.evict()
            page_of = {other: at for other, at in page_of.items() if at != page} | {item: page}
            order.begin(page, 0)
            order.wait(page)
    assert hot_missed < oldest_missed / 2


def test_likelihood_follows_what_changes(monkeypatch):
    monkeypatch.setattr(cache.eviction, "MEMORY", 64)
    order = order_of([1])
    for _ in range(1000):
        use(order, 1)
        order.begin(1, 0)
    assert likelihood_of_the_new(order) > 0.9
    for _ in range(200):
        order.begin(1, 0)
        order.wait(1)
        order.evict()
    assert likelihood_of_the_new(order) < 0.1, "200 count as much as the 1000 before"


def likelihood_of_the_new(order: EvictionOrder) -> float:
    return order._used[0] / (order._used[0] + order._lost[0])


def test_parent_goes_with_its_page_if_it_was_used_as_often_and_before():
    order = EvictionOrder(64, 16)
    for page in (1, 2):
        order.begin(page, page)
    order.wait(2)
    assert order.evict() == 2
    assert order.evict_next(1, 2)


@pytest.mark.parametrize("num_uses", [1, 5])
@pytest.mark.parametrize("parent_is_older", [True, False])
def test_parent_that_was_used_more_or_later_waits(num_uses, parent_is_older):
    order = EvictionOrder(64, 16)
    for page in (1, 2):
        order.begin(page, page)
    pages = [1] if parent_is_older else [1, 2]
    for _ in range(num_uses):
        order.use(pages)
    if parent_is_older:
        order.begin(2, 2)
    else:
        order.use([1])
    order.wait(2)
    assert order.evict() == 2
    assert not order.evict_next(1, 2)
    assert order.evict() == 1


def test_entries_of_pages_that_come_and_go_do_not_pile_up():
    order = EvictionOrder(8, 16)
    order.begin(1, 0)
    for _ in range(1000):
        order.wait(1)
        order.leave([1])
        order.use([1])
    assert sum(map(len, order._heaps.values())) <= 2 * 8 + 1
    order.wait(1)
    assert order.evict() == 1
