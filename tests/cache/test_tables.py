"""Random histories of page tables against a model that is a list of lists.

Pages have no names here; `test_prefix_index.py` has histories of named ones.
"""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cache.keys import PageNames, root_key
from cache.pages import NULL_PAGE, OutOfPages, PagePool
from cache.prefix_index import ROOT
from cache.tables import PageTables

ROWS = st.integers(0, 4)
TOKENS = st.integers(0, 30)


class Histories(RuleBasedStateMachine):
    """Rows begin with what others have, grow, and are freed (at their end or when preempted)."""

    @initialize(num_pages=st.integers(2, 14), page_size=st.integers(1, 4), width=st.integers(1, 6))
    def start(self, num_pages, page_size, width):
        self.pool = PagePool(num_pages, page_size)
        self.tables = PageTables(self.pool, 5, width)
        self.expected: list[list[int]] = [[] for _ in range(5)]

    @rule(row=ROWS, num_tokens=TOKENS)
    def grow(self, row, num_tokens):
        before = self.expected[row]
        needed = max(len(before), -(-num_tokens // self.pool.page_size))
        missing = needed - len(before)
        assert self.tables.missing(row, num_tokens) == missing
        num_free = self.pool.num_usable - len(set(chain(*self.expected)))
        if missing > num_free or needed > self.tables.width:
            with pytest.raises(OutOfPages):
                self.tables.grow(row, num_tokens)
            return
        self.tables.grow(row, num_tokens)
        new = list(self.tables.pages(row))[len(before) :]
        assert len(new) == missing
        assert set(new).isdisjoint(chain(*self.expected)), "a page that has an owner was handed out"
        self.expected[row] = before + new

    @rule(source=ROWS, row=ROWS, num_pages=st.integers(0, 6))
    def adopt(self, source, row, num_pages):
        if source == row or self.expected[row]:
            return
        self.tables.adopt(row, self.expected[source][:num_pages])
        self.expected[row] = self.expected[source][:num_pages]

    @rule(row=ROWS)
    def free(self, row):
        self.tables.free(row)
        self.expected[row] = []

    @invariant()
    def no_page_is_lost_and_owners_are_counted(self):
        owners = Counter(chain(*self.expected))
        for page in range(self.pool.num_pages):
            assert self.pool.num_owners(page) == owners[page]
        assert self.pool.num_used == len(owners)
        assert self.pool.num_free == self.pool.num_usable - len(owners)

    @invariant()
    def array_says_what_the_rows_hold(self):
        for row, pages in enumerate(self.expected):
            assert list(self.tables.pages(row)) == pages
            assert self.tables.capacity(row) == len(pages) * self.pool.page_size
            padding = [NULL_PAGE] * (self.tables.width - len(pages))
            assert self.tables.array[row].tolist() == pages + padding

    @invariant()
    def nobody_holds_the_null_page(self):
        assert NULL_PAGE not in set(chain(*self.expected))

    def teardown(self):
        for row in range(len(getattr(self, "expected", []))):
            self.tables.free(row)
            assert not self.tables.array[row].any()
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_usable


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40)


def tables(num_pages: int = 9, page_size: int = 4, width: int = 3) -> PageTables:
    return PageTables(PagePool(num_pages, page_size), num_rows=3, width=width)


def test_row_wider_than_the_table_is_refused_and_takes_nothing():
    some = tables(width=3)
    some.grow(0, 4)
    with pytest.raises(OutOfPages, match="13 tokens need 4 pages, a row has 3"):
        some.grow(0, 13)
    assert (len(some.pages(0)), some.pool.num_used) == (1, 1)


def test_growth_beyond_the_pool_takes_nothing():
    some = tables(num_pages=3)
    some.grow(0, 4)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 are free"):
        some.grow(1, 8)
    assert not some.pages(1)
    assert not some.array[1].any()


def test_growing_to_fewer_tokens_keeps_the_pages():
    some = tables()
    some.grow(0, 9)
    pages = list(some.pages(0))
    some.grow(0, 1)
    assert some.pages(0) == pages


def test_rows_with_a_common_beginning_grow_apart():
    some = tables()
    some.grow(0, 7)
    some.adopt(1, some.pages(0)[:1])
    some.grow(1, 8)
    assert some.pages(0)[0] == some.pages(1)[0]
    assert some.pages(0)[1] != some.pages(1)[1]
    some.free(0)
    assert some.pool.num_owners(some.pages(1)[0]) == 1


def test_row_with_pages_adopting_others_is_our_mistake():
    some = tables()
    some.grow(0, 4)
    some.grow(1, 1)
    with pytest.raises(AssertionError, match="row 1 still has pages"):
        some.adopt(1, some.pages(0))


def test_page_that_is_replaced_is_given_back():
    some = tables()
    names = PageNames(root_key(), 4)
    names.extend([1, 2, 3, 4])
    some.grow(0, 8)
    some.grow(1, 8)
    [theirs, _], [mine, rest] = some.pages(0), some.pages(1)
    some.pool.index.add(names, 0, theirs, ROOT)
    some.replace(1, 0, theirs)
    assert list(some.pages(1)) == some.array[1, :2].tolist() == [theirs, rest]
    assert (some.pool.num_owners(theirs), some.pool.num_owners(mine)) == (2, 0)


def test_freeing_twice_gives_back_once():
    some = tables()
    some.grow(0, 8)
    some.free(0)
    some.free(0)
    assert some.pool.num_free == some.pool.num_usable


def test_array_is_changed_in_place():
    """The runner holds the array itself."""
    some = tables()
    array = some.array
    some.grow(2, 12)
    some.free(2)
    some.grow(2, 5)
    assert array is some.array
    assert np.count_nonzero(array[2]) == 2
