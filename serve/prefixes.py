"""What a sequence takes from the prefix cache, and what it leaves there.

A page is named when the step that computes it is planned: later rows of that step and all later
steps may stand on it, since a layer writes its keys before it attends. It does not know who runs
when (`serve/scheduler.py`).
"""

from bisect import bisect_left

from cache.keys import block_of
from cache.prefix_index import ROOT
from cache.tables import PageTables
from serve.plan import Sequence

LEAST_SHARE = 4
"""A page's beginning is copied if it is a quarter of a page, or all that the other page has: most
prompts share a first token or so."""


class Prefixes:
    """A pool's index as the sequences of one scheduler use it."""

    def __init__(self, tables: PageTables) -> None:
        self.num_asked = 0
        """Tokens of prompts that were admitted."""
        self.num_found = 0
        """Those of them that were not computed again."""
        self._tables = tables
        self._pool = tables.pool
        self._index = tables.pool.index
        self._copied: list[int] = []
        """Pages that the step being planned copies: they have an owner meanwhile, so that it gives
        them to nobody who would write them before."""

    def end_plan(self) -> None:
        """The step is planned: what follows comes after it on the device."""
        self._index.written()
        self._pool.release(self._copied)
        self._copied.clear()

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens that a sequence that waits would find, in full pages; fewer than it has."""
        if sequence.names is None or sequence.needs_all_computed:
            return 0
        sequence.names.extend(sequence.tokens)
        most = (len(sequence.tokens) - 1) // self._pool.page_size
        return self._index.find(sequence.names.keys, 0, most) * self._pool.page_size

    def num_taken(self, sequence: Sequence) -> int:
        """Pages that its admission would take of those that can be handed out."""
        total = self._pool.pages_for(len(sequence.tokens) + 1)
        num_cached = self.num_cached(sequence)
        if sequence.names is None or not num_cached:
            return total
        pages = self._index.pages(sequence.names.keys[: num_cached // self._pool.page_size])
        # Those in use come first: whoever owns a page owns those it stands on.
        return total - bisect_left(pages, True, key=lambda page: not self._pool.num_owners(page))

    def admit(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Gives a sequence pages for its tokens and the next, and what is cached of them.

        Returns pages to be copied before the step, as (source, target).
        """
        names, row = sequence.names, sequence.slot
        assert row is not None, "a sequence has a slot before it has pages"
        sequence.num_computed = self.num_cached(sequence)
        sequence.num_named = sequence.num_computed // self._pool.page_size
        if names is not None and sequence.num_named:
            self._tables.adopt(row, self._index.pages(names.keys[: sequence.num_named]))
        self._tables.grow(row, len(sequence.tokens) + 1)
        copies = self._copy_start(sequence, row)
        if not sequence.num_preemptions:
            self.num_asked += sequence.num_prompt
            self._count(sequence, sequence.num_computed)
        return copies

    def catch_up(self, sequence: Sequence) -> None:
        """Lets a prompt skip what others have computed of it since it was admitted."""
        names, row, size = sequence.names, sequence.slot, self._pool.page_size
        if names is None or row is None or sequence.needs_all_computed:
            return
        number = sequence.num_named
        if sequence.num_computed != number * size:
            return
        found = self._index.find(names.keys, number, (sequence.prefill_end - 1) // size)
        for i, page in enumerate(self._index.pages(names.keys[number:found]), number):
            self._tables.replace(row, i, page)
        sequence.num_named = found
        sequence.num_computed = found * size
        if not sequence.num_preemptions:
            self._count(sequence, (found - number) * size)

    def name_planned(self, sequence: Sequence, num_tokens: int) -> None:
        """Names the full pages of the first `num_tokens` tokens, which the step being planned and
        those before it compute."""
        names, row = sequence.names, sequence.slot
        full = num_tokens // self._pool.page_size
        if names is None or row is None or full <= sequence.num_named:
            return
        names.extend(sequence.tokens)
        pages = self._tables.pages(row)
        for number in range(sequence.num_named, full):
            page = pages[number]
            named = self._index.add(names, number, page, pages[number - 1] if number else ROOT)
            if named != page:
                self._tables.replace(row, number, named)
        sequence.num_named = full

    def name_computed(self, sequence: Sequence) -> None:
        """Names the full pages of all tokens that steps have been submitted for."""
        self.name_planned(sequence, _num_computed(sequence))
        self._index.written()

    def end(self, sequence: Sequence) -> None:
        """Keeps what a sequence that leaves has computed, its last page in part."""
        self.name_computed(sequence)
        names, row, num_tokens = sequence.names, sequence.slot, _num_computed(sequence)
        number, rest = divmod(num_tokens, self._pool.page_size)
        if names is not None and row is not None and rest and number == sequence.num_named:
            pages = self._tables.pages(row)
            parent = pages[number - 1] if number else ROOT
            block = block_of(sequence.tokens[num_tokens - rest : num_tokens])
            self._index.add_end(names, number, pages[number], parent, block)

    def _copy_start(self, sequence: Sequence, row: int) -> list[tuple[int, int]]:
        """Of the page after the cached ones, what another page begins with."""
        names, size = sequence.names, self._pool.page_size
        if names is None or sequence.needs_all_computed:
            return []
        number, start = sequence.num_named, sequence.num_computed
        block = block_of(sequence.tokens[start : min(start + size, len(sequence.tokens) - 1)])
        found = self._index.find_start(names.parent(number), block)
        if found.num_shared < min(-(-size // LEAST_SHARE), max(found.num_tokens, 1)):
            return []
        self._pool.share([found.page])
        self._copied.append(found.page)
        sequence.num_computed += found.num_shared
        return [(found.page, self._tables.pages(row)[number])]

    def _count(self, sequence: Sequence, num_tokens: int) -> None:
        num_tokens = min(num_tokens, sequence.num_prompt)
        sequence.num_cached += num_tokens
        self.num_found += num_tokens


def _num_computed(sequence: Sequence) -> int:
    """Tokens that are known, and whose keys and values are: not those of the last one chosen."""
    return min(len(sequence.tokens) - 1, sequence.num_computed)
