"""What a sequence takes from the prefix cache, and what it leaves there.

A page is named when the step that computes it is planned: later rows of that step and all later
steps may stand on it, since a layer writes its keys before it attends. It does not know who runs
when (`serve/scheduler.py`).
"""

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from typing import Any, Protocol

from cache.keys import Key, block_of
from cache.pins import PinnedPages
from cache.prefix_index import ROOT
from cache.tables import PageTables
from cache.tiers.fetch import Fetch
from serve.plan import Incoming, Sequence

MOST_LANDED = 32
"""Pages that arrived which a step writes: its rows wait for it."""
LEAST_SHARE = 4
"""A page's beginning is copied if it is a quarter of a page, or all that the other page has: most
prompts share a first token or so."""


class Tiers(Protocol):
    """What lies below the device (`serve/tier_traffic.py`)."""

    @property
    def num_savable(self) -> int:
        """Pages that the next step may save."""
        ...

    def holds(self, key: Key) -> bool:
        """Whether they need not be given the page."""
        ...

    def budgets(self) -> dict[str, int]:
        """Pages that each tier has room for, nearest first."""
        ...

    def pin(self, tier: str, keys: ListLike[Key]) -> list[Key]:
        """Keeps pages, there or yet to come; returns those that it lacks (PinsExceedBudget)."""
        ...

    def unpin(self, tier: str, keys: ListLike[Key]) -> None: ...

    def use(self, keys: ListLike[Key]) -> None:
        """A sequence's pages, given from its start, were found on the device."""
        ...

    def fetch(self, keys: ListLike[Key], number: int) -> Fetch | None:
        """Brings the pages, from a sequence's page `number` on, if that is the faster way."""
        ...

    def observe_prefill(self, cost: float, seconds: float) -> None: ...

    def clear(self) -> None:
        """Lets them forget what isn't pinned."""
        ...

    def await_cleared(self, timeout_s: float) -> None:
        """Waits until nothing of that is left in a store."""
        ...


class Prefiller(Protocol):
    """Engines that compute prompts for this one (`serve/prefill`)."""

    def prefill(self, sequence: Sequence, first: int, last: int) -> Incoming | None:
        """Asks for the full pages `first` to `last - 1` of a sequence; None if they had better be
        computed here."""
        ...


class Prefixes:
    """A pool's index, and what else has pages, as the sequences of one scheduler use them."""

    def __init__(
        self,
        tables: PageTables,
        tiers: Tiers | None = None,
        prefiller: Prefiller | None = None,
    ) -> None:
        # So many are left that the longest request still has its pages.
        self.pinned = PinnedPages(tables.pool, tables.pool.num_usable - tables.width)
        """Pages of the device that are kept for others than requests."""
        self.num_asked = 0
        """Tokens of prompts that were admitted."""
        self.num_found = 0
        """Those of them that were not computed again."""
        self._tables = tables
        self._pool = tables.pool
        self._index = tables.pool.index
        self._tiers, self._prefiller = tiers, prefiller
        self._unsaved: dict[Key, int] = {}
        """Pages that the tiers have not been given yet, in the order in which they were named."""
        self._copied: list[int] = []
        """Pages that the step being planned copies: they have an owner meanwhile, so that it gives
        them to nobody who would write them before."""

    @property
    def tiers(self) -> Tiers | None:
        return self._tiers

    @property
    def has_unsaved(self) -> bool:
        return bool(self._unsaved)

    def begin_plan(self) -> list[tuple[Key, int]]:
        """Pages to save, which were computed by steps submitted before.

        They are saved before they must make room, and in order: what the tiers have of a sequence
        is a beginning of it, too.
        """
        if self._tiers is None:
            return []
        saves: list[tuple[Key, int]] = []
        num_savable = self._tiers.num_savable
        while self._unsaved and len(saves) < num_savable:
            key = next(iter(self._unsaved))
            page = self._unsaved.pop(key)
            if self._index.page_of(key) == page and not self._tiers.holds(key):
                saves.append((key, page))
        return saves

    def save(self, keys: ListLike[Key]) -> None:
        """Gives the tiers those of the pages that are here, of a sequence from its start on."""
        for key in keys:
            page = self._index.page_of(key)
            if page is not None:
                self._unsaved[key] = page

    def flush(self, running: Iterable[Sequence]) -> int:
        """Forgets all prefixes, also what is on its way to those `running`; returns how many pages
        of the device were kept for them alone. Tiers keep what is pinned there."""
        for sequence in running:
            if sequence.fetch is not None:
                sequence.fetch.cancel()
        self._unsaved.clear()
        self.pinned.let_go()
        num_pages = self._pool.flush()
        if self._tiers is not None:
            self._tiers.clear()
        return num_pages

    def end_plan(self) -> None:
        """The step is planned: what follows comes after it on the device."""
        self._index.written()
        self._pool.release(self._copied)
        self._copied.clear()

    def observe(self, prompt_cost: float, seconds: float) -> None:
        """What a step took: the tiers compare with it."""
        if self._tiers is not None and prompt_cost:
            self._tiers.observe_prefill(prompt_cost, seconds)

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
            found = names.keys[: sequence.num_named]
            self._tables.adopt(row, self._index.pages(found))
            if self._tiers is not None:
                self._tiers.use(found)
        self._tables.grow(row, len(sequence.tokens) + 1)
        sequence.has_asked = False
        sequence.fetch = self._from_tiers(sequence) or self._from_prefiller(sequence)
        copies = [] if sequence.fetch else self._copy_start(sequence, row)
        if not sequence.num_preemptions:
            self.num_asked += sequence.num_prompt
        self._count(sequence, sequence.num_computed)
        return copies

    def land(self, sequence: Sequence, most: int) -> list[tuple[int, Any]]:
        """Takes up to `most` of its pages that have arrived: those to write, and the images."""
        fetch, row, names = sequence.fetch, sequence.slot, sequence.names
        assert fetch is not None, "it waits for pages"
        assert row is not None, "which have a place"
        assert names is not None, "and a name"
        is_done = fetch.done()
        landings: list[tuple[int, Any]] = []
        taken = fetch.take(most)
        for key, image in taken:
            number = sequence.num_named
            assert key == names.keys[number], "pages come in order"
            page = self._tables.pages(row)[number]
            sequence.num_computed += self._pool.page_size
            self.name_planned(sequence, sequence.num_computed)
            # Others may have computed it meanwhile.
            if self._tables.pages(row)[number] == page:
                landings.append((page, image))
            self._count_landed(sequence, fetch.tier_of(key))
        if is_done and len(taken) < most:
            sequence.fetch = self._from_prefiller(sequence)
        return landings

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
            elif self._tiers is not None:
                self._unsaved[names.keys[number]] = page
            if self.pinned:
                self.pinned.named(names.keys[number])
        sequence.num_named = full

    def name_computed(self, sequence: Sequence) -> None:
        """Names the full pages of all tokens that steps have been submitted for."""
        # Asked for each row of each step: mostly no page has filled up.
        if len(sequence.tokens) > (sequence.num_named + 1) * self._pool.page_size:
            self.name_planned(sequence, _num_computed(sequence))
            self._index.written()

    def end(self, sequence: Sequence) -> None:
        """Keeps what a sequence that leaves has computed, its last page in part."""
        if sequence.fetch is not None:
            sequence.fetch.cancel()
            sequence.fetch = None
        self.name_computed(sequence)
        names, row, num_tokens = sequence.names, sequence.slot, _num_computed(sequence)
        number, rest = divmod(num_tokens, self._pool.page_size)
        if names is not None and row is not None and rest and number == sequence.num_named:
            pages = self._tables.pages(row)
            parent = pages[number - 1] if number else ROOT
            block = block_of(sequence.tokens[num_tokens - rest : num_tokens])
            self._index.add_end(names, number, pages[number], parent, block)

    def _from_tiers(self, sequence: Sequence) -> Incoming | None:
        """Asks the tiers for what comes after the pages that are here."""
        names, number = sequence.names, sequence.num_named
        last = self._last_page(sequence)
        if self._tiers is None or names is None or number >= last:
            return None
        return self._tiers.fetch(names.keys[number:last], number)

    def _from_prefiller(self, sequence: Sequence) -> Incoming | None:
        """Asks another engine, once, to compute what comes after the pages that are here."""
        number, last = sequence.num_named, self._last_page(sequence)
        if self._prefiller is None or sequence.has_asked or number >= last:
            return None
        sequence.has_asked = True
        return self._prefiller.prefill(sequence, number, last)

    def _last_page(self, sequence: Sequence) -> int:
        """Full pages that may come from elsewhere: one token is left to compute, as what it gives
        is the next."""
        if sequence.names is None or sequence.needs_all_computed:
            return 0
        return (len(sequence.tokens) - 1) // self._pool.page_size

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

    def _count_landed(self, sequence: Sequence, tier: str | None) -> None:
        """Counts a page that came from a tier, or from who computed it for this sequence."""
        size = self._pool.page_size
        if tier is not None:
            self._count(sequence, size)
        if sequence.num_preemptions:
            return
        if tier is not None:
            sequence.fetched[tier] += size
        else:
            sequence.num_sent += size

    def _count(self, sequence: Sequence, num_tokens: int) -> None:
        if sequence.num_preemptions:
            return  # it was counted when it was admitted first
        num_tokens = min(num_tokens, sequence.num_prompt)
        sequence.num_cached += num_tokens
        self.num_found += num_tokens


def _num_computed(sequence: Sequence) -> int:
    """Tokens that are known, and whose keys and values are: not those of the last one chosen."""
    return min(len(sequence.tokens) - 1, sequence.num_computed)
