"""The prefix index by itself, and random histories of pool, index and tables against a model that
remembers whole prefixes, by their tokens."""

from collections import Counter
from itertools import chain

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.keys import PageNames, block_of, root_key
from cache.pages import NULL_PAGE, OutOfPages, PagePool
from cache.prefix_index import ROOT, PrefixIndex, Start
from cache.tables import PageTables

NUM_ROWS, WIDTH = 3, 6
TENANTS = (("a", ""), ("b", ""), ("a", "b"), ("", "ab"))
"""With a salt: names that could be confused."""
ROWS = st.integers(0, NUM_ROWS - 1)
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
"""Of two tokens only, so that they meet."""


class Histories(RuleBasedStateMachine):
    """Rows are admitted, computed piece by piece, named and ended; names are flushed.

    `contents` says of each page what was computed into it, all that came before it included: what a
    device's page would hold.
    """

    @initialize(num_pages=st.integers(2, 12), page_size=st.integers(1, 3))
    def start(self, num_pages, page_size):
        self.size = page_size
        self.pool = PagePool(num_pages, page_size, cost=lambda position: 1 + position / 4)
        self.index = self.pool.index
        self.tables = PageTables(self.pool, NUM_ROWS, WIDTH)
        self.contents: dict[int, tuple] = {}
        self.named: dict[tuple, int] = {}
        """Pages that must be found, by what they hold."""
        self.tenants = [TENANTS[0]] * NUM_ROWS
        self.tokens: list[list[int]] = [[] for _ in range(NUM_ROWS)]
        self.names = [PageNames(b"", 1) for _ in range(NUM_ROWS)]
        self.num_computed = [0] * NUM_ROWS
        self.num_named = [0] * NUM_ROWS
        self.expected: list[list[int]] = [[] for _ in range(NUM_ROWS)]
        """The rows' pages."""

    def held(self, row, number, end):
        """What the row's page `number` holds where its tokens end at `end`."""
        return (self.tenants[row], tuple(self.tokens[row][:end]), number)

    def owners(self):
        return Counter(chain(*self.expected))

    def take_names_of(self, pages):
        """Of new pages, those that had names must have been idle, and leaves when they went."""
        owners = self.owners()
        for page in pages:
            assert not owners[page], f"page {page} has an owner and was handed out"
            if content := next((c for c, p in self.named.items() if p == page), None):
                assert not self.children(content), f"page {page} was evicted before a longer prefix"
                del self.named[content]
            self.contents.pop(page, None)

    def children(self, content):
        tenant, tokens, number = content
        beyond = [c for c in self.named if c[0] == tenant and c[2] == number + 1]
        is_full = len(tokens) == (number + 1) * self.size
        return [c for c in beyond if is_full and c[1][: len(tokens)] == tokens]

    def grow(self, row, num_tokens):
        before = self.tables.pages(row)[:]
        num_free = self.pool.num_usable - len(self.owners())
        missing = self.pool.pages_for(num_tokens) - len(before)
        if missing > num_free or len(before) + missing > WIDTH:
            with pytest.raises(OutOfPages):
                self.tables.grow(row, num_tokens)
            return False
        self.tables.grow(row, num_tokens)
        new = list(self.tables.pages(row))[len(before) :]
        self.take_names_of(new)
        self.expected[row] = before + new
        return True

    @rule(row=ROWS, tenant=st.sampled_from(TENANTS), prompt=PROMPTS, num_tokens=st.integers(0, 12))
    def admit(self, row, tenant, prompt, num_tokens):
        if self.expected[row]:
            self.end(row)
        names = PageNames(root_key(*tenant), self.size)
        names.extend(prompt)
        found = self.index.find(names.keys, 0, len(names))
        pages = self.index.pages(names.keys[:found])
        self.tenants[row], self.tokens[row], self.names[row] = tenant, prompt, names
        known = [
            self.named.get(self.held(row, number, (number + 1) * self.size))
            for number in range(len(names))
        ]
        assert pages == known[:found]
        assert not any(known[found:]), "a longer prefix is there"
        if found > WIDTH:
            return
        self.tables.adopt(row, pages)
        self.expected[row] = list(pages)
        self.num_computed[row] = found * self.size
        self.num_named[row] = found
        if self.grow(row, len(prompt)):
            self.compute(row, num_tokens)
        else:
            self.drop(row)

    @precondition(lambda self: any(self.expected))
    @rule(row=ROWS, num_tokens=st.integers(1, 6))
    def compute(self, row, num_tokens):
        """Some of what is left of the row's prompt; names the pages that are full."""
        if not self.expected[row]:
            return
        done = min(len(self.tokens[row]), self.num_computed[row] + num_tokens)
        for at in range(self.num_computed[row], done):
            number = at // self.size
            self.contents[self.expected[row][number]] = self.held(row, number, at + 1)
        self.num_computed[row] = done
        self.name(row)

    def name(self, row):
        pages = self.tables.pages(row)
        for number in range(self.num_named[row], self.num_computed[row] // self.size):
            parent = pages[number - 1] if number else ROOT
            page = self.index.add(self.names[row], number, pages[number], parent)
            content = self.held(row, number, (number + 1) * self.size)
            known = self.named.get(content)
            if known is not None:
                assert page == known
                self.replace(row, number, page)
            elif self.stands(row, number):
                self.named[content] = page
            assert page == pages[number]
        self.num_named[row] = self.num_computed[row] // self.size

    def stands(self, row, number):
        """Whether the page before the row's page `number` is one that is found."""
        if number == 0:
            return True
        before = self.held(row, number - 1, number * self.size)
        return self.named.get(before) == self.expected[row][number - 1]

    def replace(self, row, number, page):
        """The row is to hold what `page` stands on, whatever it held."""
        self.tables.replace(row, number, page)
        for i in range(number + 1):
            content = self.held(row, i, (i + 1) * self.size)
            self.expected[row][i] = self.named[content]

    @precondition(lambda self: any(self.expected))
    @rule(row=ROWS)
    def catch_up(self, row):
        number = self.num_named[row]
        if not self.expected[row] or self.num_computed[row] != number * self.size:
            return
        keys = self.names[row].keys
        found = self.index.find(keys, number, len(keys))
        for i, page in enumerate(self.index.pages(keys[number:found]), number):
            self.replace(row, i, page)
        self.num_named[row] = found
        self.num_computed[row] = found * self.size

    @rule()
    def submit(self):
        self.index.written()

    @precondition(lambda self: any(self.expected))
    @rule(row=ROWS)
    def end(self, row):
        """The row's last page, not full, is remembered, too."""
        if not self.expected[row]:
            return
        number, rest = divmod(self.num_computed[row], self.size)
        if rest:
            pages = self.expected[row]
            done = self.num_computed[row]
            parent = pages[number - 1] if number else ROOT
            block = block_of(self.tokens[row][done - rest : done])
            self.index.add_end(self.names[row], number, pages[number], parent, block)
            if self.stands(row, number):
                self.named.setdefault(self.held(row, number, done), pages[number])
        self.drop(row)

    @precondition(lambda self: any(self.expected))
    @rule(row=ROWS)
    def drop(self, row):
        self.tables.free(row)
        self.expected[row] = []
        self.num_computed[row] = self.num_named[row] = 0

    @rule()
    def flush(self):
        owners = self.owners()
        num_idle = sum(not owners[page] for page in self.named.values())
        assert self.pool.flush() == num_idle
        self.named.clear()

    @precondition(lambda self: self.index.num_idle)
    @rule(share=st.sampled_from([0.3, 0.7, 1.0]))
    def need_room(self, share):
        pages = self.pool.allocate(round(share * self.pool.num_free))
        self.take_names_of(pages)
        if share == 1:
            owners = self.owners()
            assert all(owners[page] for page in self.named.values())
        self.pool.release(pages)

    @rule(tenant=st.sampled_from(TENANTS), prompt=PROMPTS)
    def find_start(self, tenant, prompt):
        number = (len(prompt) - 1) // self.size
        names = PageNames(root_key(*tenant), self.size)
        names.extend(prompt)
        block = prompt[number * self.size :]
        found = self.index.find_start(names.parent(number), block_of(block))
        if found.page == ROOT:
            assert found == Start(ROOT, 0, 0)
            return
        whose, tokens, there = self.contents[found.page]
        assert (whose, there) == (tenant, number)
        assert tokens[: number * self.size] == tuple(prompt[: number * self.size])
        rest = tokens[number * self.size :]
        shared = [a == b for a, b in zip(rest, block, strict=False)]
        assert found.num_shared == [*shared, False].index(False)
        assert found.num_tokens == len(rest)

    @invariant()
    def no_page_is_lost_or_owned_by_more_or_fewer_than_hold_it(self):
        owners = self.owners()
        assert [self.pool.num_owners(page) for page in range(self.pool.num_pages)] == [
            owners[page] for page in range(self.pool.num_pages)
        ]
        assert self.pool.num_used == len(owners)
        assert NULL_PAGE not in owners
        assert [list(self.tables.pages(row)) for row in range(NUM_ROWS)] == self.expected

    @invariant()
    def idle_pages_are_those_with_a_name_and_no_owner(self):
        owners = self.owners()
        assert len(self.index) == len(self.named)
        assert self.index.num_idle == sum(not owners[page] for page in self.named.values())

    @invariant()
    def named_pages_hold_what_their_names_say(self):
        for content, page in self.named.items():
            assert self.contents[page] == content

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for row in range(NUM_ROWS):
            self.end(row)
        assert sorted(self.pool.allocate(self.pool.num_free)) == [*range(1, self.pool.num_pages)]
        assert len(self.index) == self.index.num_idle == 0


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def sequence(tokens: list[int], page_size: int = 2) -> PageNames:
    names = PageNames(root_key(), page_size)
    names.extend(tokens)
    return names


def keep(pool: PagePool, tokens: list[int]) -> list[int]:
    """The pages of a sequence that came, was computed and ended."""
    names, tables = sequence(tokens, pool.page_size), PageTables(pool, 1, 64)
    found = pool.index.find(names.keys, 0, len(names))
    tables.adopt(0, pool.index.pages(names.keys[:found]))
    tables.grow(0, len(tokens))
    pages = list(tables.pages(0))
    for number in range(found, len(names)):
        pool.index.add(names, number, pages[number], pages[number - 1] if number else ROOT)
    pool.index.written()
    number, rest = divmod(len(tokens), pool.page_size)
    if rest:
        parent = pages[number - 1] if number else ROOT
        pool.index.add_end(names, number, pages[number], parent, block_of(tokens[-rest:]))
    tables.free(0)
    return pages


def num_found(pool: PagePool, tokens: list[int]) -> int:
    names = sequence(tokens, pool.page_size)
    return pool.index.find(names.keys, 0, len(names))


@pytest.mark.parametrize("num_shared", range(6))
def test_longest_prefix_is_found(num_shared):
    pool = PagePool(16, 2)
    pages = keep(pool, list(range(10)))
    prompt = [*range(2 * num_shared), *range(20, 30)]
    assert num_found(pool, prompt) == num_shared
    assert pool.index.pages(sequence(prompt).keys[:num_shared]) == pages[:num_shared]


def test_page_is_copied_from_only_when_it_is_written():
    index = PrefixIndex(4, 4)
    names = sequence([1, 2, 3, 4], 4)
    index.add(names, 0, 2, ROOT)
    block = block_of([1, 2, 9, 9])
    assert index.find_start(root_key(), block) == Start(ROOT, 0, 0)
    index.written()
    assert index.find_start(root_key(), block) == Start(2, 2, 4)


def test_end_of_a_sequence_is_found_by_what_it_begins_with():
    pool = PagePool(8, 4)
    pages = keep(pool, [1, 2, 3, 4, 5, 6, 7])
    parent = sequence([1, 2, 3, 4], 4).keys[0]
    assert pool.index.find_start(parent, block_of([5, 6, 7, 8])) == Start(pages[1], 3, 3)
    assert pool.index.find_start(parent, block_of([5, 9])) == Start(pages[1], 1, 3)
    assert pool.index.find_start(parent, block_of([9])) == Start(ROOT, 0, 0)
    assert pool.index.find_start(parent, b"") == Start(ROOT, 0, 0)


def test_tokens_that_differ_in_a_high_byte_are_not_shared():
    pool = PagePool(8, 4)
    pages = keep(pool, [1, 2, 3])
    assert pool.index.find_start(root_key(), block_of([1, 2 + (1 << 24)])) == Start(pages[0], 1, 3)


def test_of_pages_that_begin_alike_the_last_is_copied_from():
    pool = PagePool(8, 4)
    _, [second] = keep(pool, [1, 2, 3, 4]), keep(pool, [1, 5, 6, 7])
    assert pool.index.find_start(root_key(), block_of([1, 5])) == Start(second, 2, 4)


def test_page_that_goes_leaves_another_that_begins_alike_to_be_copied_from():
    pool = PagePool(4, 4)
    _, [second], _ = keep(pool, [1, 2, 3, 4]), keep(pool, [1, 5, 6, 7]), keep(pool, [8])
    pool.allocate(1)
    assert num_found(pool, [1, 2, 3, 4]) == 0
    assert pool.index.find_start(root_key(), block_of([1, 5])) == Start(second, 2, 4)


def test_flushed_pages_are_free_and_are_not_found():
    pool = PagePool(8, 2)
    keep(pool, [1, 2, 3, 4, 5])
    assert pool.flush() == 3
    assert (pool.num_free, pool.index.num_idle, len(pool.index)) == (7, 0, 0)
    assert num_found(pool, [1, 2, 3, 4]) == 0
    assert pool.index.find_start(root_key(), block_of([1, 2])) == Start(ROOT, 0, 0)
    assert pool.flush() == 0


def test_owned_page_that_was_flushed_is_free_when_its_owner_leaves():
    pool = PagePool(4, 2)
    keep(pool, [1, 2, 3, 4])
    tables = PageTables(pool, 1, 4)
    tables.adopt(0, pool.index.pages(sequence([1, 2, 3, 4]).keys))
    assert pool.flush() == 0
    assert pool.num_used == 2
    tables.free(0)
    assert (pool.num_free, pool.index.num_idle) == (3, 0)


def test_flushed_row_takes_all_that_a_page_it_finds_stands_on():
    """Or else a page could have an owner, and those it stands on none: they would count as room,
    and could not be had."""
    pool, tokens = PagePool(6, 2), [1, 2, 3, 4]
    tables, names = PageTables(pool, 2, 2), sequence(tokens)
    tables.grow(0, 4)
    pool.index.add(names, 0, tables.pages(0)[0], ROOT)
    pool.flush()
    kept = keep(pool, tokens)
    mine = tables.pages(0)
    tables.replace(0, 1, pool.index.add(names, 1, mine[1], mine[0]))
    assert list(tables.pages(0)) == tables.array[0].tolist() == kept
    assert len(pool.allocate(pool.num_free)) == 3


def test_page_that_a_row_took_over_is_not_evicted():
    """It was idle, and nobody asked for it by name: the row had computed the same."""
    pool, tokens = PagePool(6, 2), [1, 2]
    tables, names = PageTables(pool, 1, 2), sequence(tokens)
    tables.grow(0, 2)
    kept = keep(pool, tokens)
    tables.replace(0, 0, pool.index.add(names, 0, tables.pages(0)[0], ROOT))
    assert list(tables.pages(0)) == kept
    assert not set(pool.allocate(pool.num_free)) & set(kept)


def test_sharing_a_page_that_is_neither_owned_nor_named_is_our_mistake():
    pool = PagePool(3, 1)
    with pytest.raises(AssertionError, match="page 2 is shared but has no owner and no name"):
        pool.share([2])
