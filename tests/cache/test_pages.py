"""The pool of pages by itself; `test_tables.py` drives it with random histories."""

import pytest

from cache.pages import NULL_PAGE, OutOfPages, PagePool


def test_pool_hands_out_every_page_but_the_null_page_once():
    pool = PagePool(6, 4)
    pages = pool.allocate(2) + pool.allocate(3)
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert NULL_PAGE not in pages
    assert (pool.num_usable, pool.num_used, pool.num_free) == (5, 5, 0)


def test_allocation_is_all_or_none():
    pool = PagePool(4, 1)
    with pytest.raises(OutOfPages, match="4 pages asked for, 3 are free"):
        pool.allocate(4)
    assert pool.num_free == 3
    assert len(pool.allocate(3)) == 3


def test_allocating_nothing_takes_nothing():
    pool = PagePool(2, 1)
    pool.allocate(1)
    assert pool.allocate(0) == []


def test_shared_page_is_free_after_its_last_owner_left():
    pool = PagePool(2, 1)
    [page] = pool.allocate(1)
    pool.share([page])
    pool.share([page])
    for num_owners in (3, 2, 1):
        assert (pool.num_owners(page), pool.num_free) == (num_owners, 0)
        pool.release([page])
    assert (pool.num_owners(page), pool.num_free) == (0, 1)


def test_page_freed_last_is_handed_out_first():
    pool = PagePool(9, 1)
    pages = pool.allocate(8)
    pool.release([pages[5]])
    pool.release([pages[2]])
    assert pool.allocate(2) == [pages[2], pages[5]]


@pytest.mark.parametrize(
    ("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_pages_for_rounds_up(num_tokens, num_pages):
    assert PagePool(2, 4).pages_for(num_tokens) == num_pages


@pytest.mark.parametrize("num_pages", [1, 0, -3])
def test_pool_without_a_page_to_hand_out_is_refused(num_pages):
    with pytest.raises(ValueError, match=rf"a pool of {num_pages} pages .* 2 is the least"):
        PagePool(num_pages, 16)


@pytest.mark.parametrize("page_size", [0, -1])
def test_page_of_no_tokens_is_refused(page_size):
    with pytest.raises(ValueError, match=f"page_size is {page_size}; it must be 1 or more"):
        PagePool(8, page_size)


@pytest.mark.parametrize("act", [PagePool.release, PagePool.share])
def test_free_page_and_null_page_have_no_owner_to_add_or_take(act):
    pool = PagePool(3, 1)
    pages = pool.allocate(2)
    pool.release(pages[:1])
    for page in (pages[0], NULL_PAGE):
        with pytest.raises(AssertionError, match=f"page {page} .* no owner"):
            act(pool, [page])
    assert (pool.num_free, pool.num_owners(pages[1])) == (1, 1)
