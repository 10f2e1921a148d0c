"""Pages of running prompts that other engines wait for: which of them the next step reads.

A page that was named by a plan before this one is computed by a step submitted before it. It does
not know how pages travel (`cache/transfers`), or who runs when.
"""

from collections.abc import Iterable
from collections.abc import Sequence as ListLike

from cache.tables import PageTables
from cache.transfers.sending import Sending
from serve.plan import Send, Sequence

MOST_SENT = 64
"""Pages that lie on the devices once more, until they are delivered: of all receivers together."""


class Sends:
    """The sendings of one scheduler's sequences, of which some have left before all was read."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        self._left: dict[Sending, ListLike[int]] = {}
        """Pages, from the start on, of sequences that have left: owned until what is wanted of them
        is read."""
        self._read: list[ListLike[int]] = []
        """Those of which the step being planned reads the last: owned until it is planned."""
        self._under_way: set[Sending] = set()
        """With pages that are yet to be delivered."""

    @property
    def has_work(self) -> bool:
        """Whether a plan would read or let go of something, though nobody runs."""
        return any(
            sending.is_over or sending.readable(len(pages)) for sending, pages in self._left.items()
        )

    @property
    def held(self) -> list[int]:
        """Pages kept for receivers of what has left: each as often as it is."""
        return [page for pages in self._left.values() for page in pages]

    def begin_plan(self, running: Iterable[Sequence]) -> list[Send]:
        """The pages to read before the step writes anything, as far as receivers keep up."""
        sends: list[Send] = []
        self._under_way = {sending for sending in self._under_way if sending.num_on_devices}
        room = MOST_SENT - sum(sending.num_on_devices for sending in self._under_way)
        for sending, pages in list(self._left.items()):
            sends += self._readings(sending, pages, room - len(sends))
            if sending.is_over or sending.next >= len(pages):
                self._read.append(self._left.pop(sending))
        for sequence in running:
            if sequence.sending is not None and sequence.slot is not None:
                pages = self._tables.pages(sequence.slot)[: sequence.num_named]
                sends += self._readings(sequence.sending, pages, room - len(sends))
        return sends

    def end_plan(self) -> None:
        """The step is planned: what follows comes after it on the device."""
        for pages in self._read:
            self._tables.pool.release(pages)
        self._read.clear()

    def leave(self, sequence: Sequence) -> None:
        """Keeps what a sequence that is about to leave has computed and is still to be read."""
        sending = sequence.sending
        if sending is None or sending.is_over or sequence.slot is None:
            return
        pages = list(self._tables.pages(sequence.slot)[: sequence.num_named])
        before = self._left.get(sending, ())  # preempted, it left with what it had then
        if max(sending.next, len(before)) < len(pages):
            self._tables.pool.share(pages)
            self._tables.pool.release(before)
            self._left[sending] = pages

    def _readings(self, sending: Sending, pages: ListLike[int], most: int) -> list[Send]:
        numbers = sending.readable(len(pages))[: max(0, most)]
        if numbers:
            sending.read(numbers)
            self._under_way.add(sending)
        return [Send(sending, number, pages[number]) for number in numbers]
