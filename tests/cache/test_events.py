"""Following what is held: a snapshot and the events after it give it exactly, at any moment."""

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from cache.events import DEVICE, Change, Event, EventLog, FellBehind, OnChange, Subscription
from cache.keys import Key, PageNames, root_key
from cache.pages import PagePool
from cache.tiers.counts import Decisions, Drop
from cache.tiers.host import HostTier
from cache.tiers.ledger import Ledger
from cache.tiers.store import StoreTier
from tests.cache.test_prefix_index import Histories, keep, sequence
from tests.cache.tiers.fake_store import FORM, IMAGE_BYTES, FakeStore, image, key, keys, until

MOST = 1_000


class Reader:
    """What one who subscribed knows."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.held: dict[tuple[int, str], dict[Key, tuple[Key, int]]] = {}
        """By replica and tier: the pages' parents and tokens."""
        self.number = 0
        self.num_snapshots = 0
        self.events: list[Event] = []
        """Of the last `read`."""

    def read(self, most: int = MOST, batches: int = MOST) -> None:
        """Up to so many batches of what there is."""
        self.events = []
        while batches and (batch := self.subscription.take(most)) is not None:
            batches -= 1
            assert len(batch.events) <= most
            if batch.is_snapshot:
                self.num_snapshots += batch.is_snapshot_end
            else:
                assert batch.sequence_number == self.number + len(batch.events)
            self.number = batch.sequence_number
            self.events += batch.events
            for event in batch.events:
                pages = self.held.setdefault((event.replica, event.tier), {})
                match event.change:
                    case Change.STORED:
                        assert event.key not in pages
                        pages[event.key] = event.parent_key, event.num_tokens
                    case Change.REMOVED:
                        del pages[event.key]
                    case Change.CLEARED:
                        pages.clear()

    def keys(self, tier: str, replica: int = 0) -> set[Key]:
        return set(self.held.get((replica, tier), {}))


class Log:
    """One with a holder, of which a test says what it has."""

    def __init__(self, num_kept: int = 100) -> None:
        self.log = EventLog("now", num_kept)
        self.log.add(0, DEVICE, self.follow, page_size=16)
        self.on_change: OnChange | None = None

    def follow(self, on_change: OnChange) -> None:
        self.on_change = on_change

    def store(self, *numbers: int) -> None:
        assert self.on_change is not None
        for number in numbers:
            self.on_change(Change.STORED, [key(number)])


class FollowedHistories(Histories):
    """Readers come, read sooner or later, go away and come back."""

    log: EventLog | None = None

    @precondition(lambda self: self.log is None)
    @rule(num_kept=st.integers(1, 20))
    def begin(self, num_kept):
        self.log = EventLog("now", num_kept)
        self.log.add(0, DEVICE, self.index.follow, self.size)
        self.prompt_reader = Reader(self.log.subscribe())
        self.late_reader = Reader(self.log.subscribe())

    @precondition(lambda self: self.log is not None)
    @rule(most=st.integers(1, 3), batches=st.integers(1, 3))
    def read_some(self, most, batches):
        assert self.log is not None
        try:
            self.late_reader.read(most, batches)
        except FellBehind:
            self.late_reader = Reader(self.log.subscribe())

    @precondition(lambda self: self.log is not None and self.late_reader.num_snapshots)
    @rule()
    def come_back(self):
        """Its snapshot has come whole; it may get another one."""
        assert self.log is not None
        again = self.log.subscribe("now", self.late_reader.number)
        if (batch := again.take(0)) is not None and batch.is_snapshot:
            self.late_reader = Reader(self.log.subscribe())
        else:
            self.late_reader.subscription = again

    @invariant()
    def readers_know_exactly_what_is_found(self):
        if self.log is None:
            return
        expected: dict[Key, tuple[Key, int]] = {}
        for tenant, tokens, number in self.named:
            if len(tokens) == (number + 1) * self.size:
                names = PageNames(root_key(*tenant), self.size)
                names.extend(tokens)
                expected[names.keys[number]] = names.parent(number), self.size
        newcomer = Reader(self.log.subscribe())
        try:
            self.prompt_reader.read()
        except FellBehind:  # by what one rule did
            self.prompt_reader = newcomer
        for reader in (self.prompt_reader, newcomer):
            reader.read()
            assert reader.held.get((0, DEVICE), {}) == expected
        assert self.prompt_reader.number == newcomer.number


TestFollowedHistories = FollowedHistories.TestCase
TestFollowedHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "pin", "unpin", "use", "clear"]), st.integers(0, 5)
    )
)


@given(OPERATIONS, st.integers(0, 4), st.integers(0, 10))
def test_host_tier_is_followed_exactly(operations: list, capacity: int, start: int):
    host = HostTier(capacity * IMAGE_BYTES, IMAGE_BYTES)
    log = EventLog("now")
    log.add(0, "host", host.follow)
    reader: Reader | None = None
    pinned: list[int] = []
    for step, (operation, number) in enumerate(operations):
        if step == start:
            reader = Reader(log.subscribe())
        match operation:
            case "put":
                host.put(key(number), image(key(number)))
            case "pin" if len(set(pinned)) < capacity:
                host.pin([key(number)])
                pinned.append(number)
            case "unpin" if pinned:
                host.unpin([key(pinned.pop())])
            case "use":
                host.use([key(number)])
            case "clear":
                host.clear()
        if reader is not None:
            reader.read()
            assert reader.keys("host") == {one for one in keys(6) if host.holds(one)}


def test_flush_of_a_tier_is_one_event_unless_pages_are_pinned():
    host = HostTier(5 * IMAGE_BYTES, IMAGE_BYTES)
    log = EventLog("now")
    log.add(0, "host", host.follow)
    reader = Reader(log.subscribe())
    for one in keys(3):
        host.put(one, image(one))
    reader.read()
    host.clear()
    reader.read()
    assert reader.events == [Event(Change.CLEARED, "host", 0)]
    for one in keys(3):
        host.put(one, image(one))
    host.pin([key(1)])
    reader.read()
    host.clear()
    reader.read()
    assert reader.events == [Event(Change.REMOVED, "host", 0, key(i)) for i in (0, 2)]
    assert reader.keys("host") == {key(1)}


def followed_store(store: FakeStore, capacity: int) -> tuple[StoreTier, Reader]:
    tier = StoreTier("disk", store, FORM, capacity * FORM.record_bytes)
    log = EventLog("now")
    log.add(0, "disk", tier.follow)
    listed = threading.Event()
    tier.start(listed.set)
    assert listed.wait(5.0)
    return tier, Reader(log.subscribe())


def until_known(reader: Reader, expected: set[Key]) -> None:
    def knows() -> bool:
        reader.read()
        return reader.keys("disk") == expected

    until(knows)


def close(tier: StoreTier) -> None:
    tier.stop(5.0)
    tier.join()


def test_store_tells_what_is_written_evicted_damaged_and_cleared():
    store = FakeStore()
    tier, reader = followed_store(store, capacity=4)
    for one in keys(4):
        tier.write(one, image(one))
    until_known(reader, set(keys(4)))
    tier.write(key(9), image(key(9)))
    until_known(reader, {*keys(4)[1:], key(9)})
    [damaged] = [name for name in store.records() if key(2).hex() in name]
    store.data[damaged] = b"cut off"
    tier.read(key(2), lambda outcome: None)
    until_known(reader, {key(1), key(3), key(9)})
    [gone] = [name for name in store.records() if key(3).hex() in name]
    del store.data[gone]
    tier.read(key(3), lambda outcome: None)
    until_known(reader, {key(1), key(9)})
    tier.clear()
    reader.read()
    assert reader.events[-1] == Event(Change.CLEARED, "disk", 0)
    close(tier)


def test_pages_that_a_store_cannot_delete_to_make_room_are_told_of_again():
    store = FakeStore()
    tier, reader = followed_store(store, capacity=20)
    for one in keys(20):
        tier.write(one, image(one))
    until_known(reader, set(keys(20)))
    store.errors["delete"] = OSError(30, "Read-only file system")
    tier.write(key(30), image(key(30)))
    until(lambda: tier.report(Decisions()).counts.drops[Drop.NO_ROOM])
    until_known(reader, set(keys(20)))
    changes = [event.change for event in reader.events]
    assert Change.REMOVED in changes
    assert changes[-1] is Change.STORED
    close(tier)


def test_pages_that_a_store_had_before_are_told_of():
    store = FakeStore()
    first, _ = followed_store(store, capacity=4)
    for one in keys(3):
        first.write(one, image(one))
    close(first)
    second, reader = followed_store(store, capacity=4)
    reader.read()
    assert reader.keys("disk") == set(keys(3))
    close(second)


def test_page_that_is_taken_back_though_it_has_come_again_is_no_event():
    """Its deletion failed, which took longer than to write it once more."""
    ledger, log = Ledger("disk", 10, 1), EventLog("now")
    log.add(0, "disk", ledger.follow)
    reader = Reader(log.subscribe())
    ledger.enter(key(1))
    assert ledger.leave(key(1))
    ledger.enter(key(1))
    ledger.release()
    ledger.enter(key(1))
    reader.read()
    changes = [event.change for event in reader.events]
    assert changes == [Change.STORED, Change.REMOVED, Change.STORED]
    assert len(ledger) == 1


def test_end_of_a_sequence_is_no_event():
    pool = PagePool(3, 4)
    log = EventLog("now")
    log.add(0, DEVICE, pool.index.follow, 4)
    keep(pool, [1, 2, 3, 4, 5])
    reader = Reader(log.subscribe())
    reader.read()
    assert reader.keys(DEVICE) == set(sequence([1, 2, 3, 4], 4).keys)
    pool.release(pool.allocate(1))
    assert len(pool.index) == 1, "the end went first"
    keep(pool, [1, 2, 3, 4, 6])
    reader.read()
    assert reader.events == []
    pool.release(pool.allocate(2))
    reader.read()
    assert reader.events == [Event(Change.REMOVED, DEVICE, 0, *sequence([1, 2, 3, 4], 4).keys)]


def test_nobody_is_asked_before_somebody_subscribes():
    one = Log()
    assert one.on_change is None
    one.log.subscribe()
    assert one.on_change is not None


def test_events_of_all_replicas_and_tiers_have_one_order():
    log, tell = EventLog("now"), dict[tuple[int, str], OnChange]()
    for place in ((0, DEVICE), (1, DEVICE), (1, "host")):
        log.add(*place, follow=lambda on_change, place=place: tell.update({place: on_change}))
    reader = Reader(log.subscribe())
    for number, place in enumerate([(1, "host"), (0, DEVICE), (1, DEVICE), (1, "host")]):
        tell[place](Change.STORED, [key(number)])
    reader.read()
    assert [(e.replica, e.tier, e.key) for e in reader.events] == [
        (1, "host", key(0)),
        (0, DEVICE, key(1)),
        (1, DEVICE, key(2)),
        (1, "host", key(3)),
    ]
    tell[0, DEVICE](Change.CLEARED)
    reader.read()
    assert reader.keys(DEVICE, 0) == set()
    assert reader.keys(DEVICE, 1) == {key(2)}, "another's stay"


def test_two_tiers_of_one_name_are_refused():
    one = Log()
    with pytest.raises(ValueError, match="replica 0 has two tiers 'device'; give one another name"):
        one.log.add(0, DEVICE, one.follow)


def test_snapshot_of_nothing_is_one_batch():
    batch = Log().log.subscribe().take(MOST)
    assert batch is not None
    assert (batch.is_snapshot, batch.is_snapshot_end, batch.events) == (True, True, [])


@pytest.mark.parametrize("num_pages", [1, 2, 3, 4])
def test_long_snapshot_comes_in_parts_of_which_the_last_says_so(num_pages: int):
    one = Log()
    one.log.subscribe()
    one.store(*range(num_pages))
    subscription = one.log.subscribe()
    one.store(99)
    parts = [subscription.take(2) for _ in range((num_pages + 1) // 2)]
    assert [part.is_snapshot_end for part in parts if part] == [*[False] * (len(parts) - 1), True]
    assert {event.key for part in parts if part for event in part.events} == set(keys(num_pages))
    assert all(part.sequence_number == num_pages for part in parts if part)
    after = subscription.take(2)
    assert after is not None
    assert (after.sequence_number, after.is_snapshot) == (num_pages + 1, False)


def test_reader_too_slow_is_told_so_each_time_and_the_others_go_on():
    one = Log(num_kept=10)
    slow, fast = Reader(one.log.subscribe()), Reader(one.log.subscribe())
    slow.read()
    for number in range(30):
        one.store(number)
        fast.read()
    for _ in range(2):
        with pytest.raises(FellBehind, match=r"30 cache events behind, and 10 are kept; subscribe"):
            slow.read()
    assert fast.keys(DEVICE) == set(keys(30))


@pytest.mark.parametrize(("num_read", "is_too_slow"), [(9, True), (10, False)])
def test_reader_is_too_slow_when_its_next_event_is_gone(num_read: int, is_too_slow: bool):
    one = Log(num_kept=10)
    reader = Reader(one.log.subscribe())
    one.store(*range(num_read))
    reader.read()
    one.store(*range(num_read, 20))
    if is_too_slow:
        with pytest.raises(FellBehind):
            reader.read()
    else:
        reader.read()
        assert reader.keys(DEVICE) == set(keys(20))


@pytest.mark.parametrize(
    ("epoch", "number", "num_snapshots"),
    [
        ("now", 19, 0),
        ("now", 10, 0),
        ("now", 9, 1),
        ("now", 0, 1),
        ("now", 20, 1),
        ("before", 19, 1),
        ("", 19, 1),
    ],
    ids=["the last", "the first kept", "no longer kept", "0", "to come", "another start", "none"],
)
def test_who_comes_back_goes_on_where_that_is_possible(epoch, number, num_snapshots):
    one = Log(num_kept=5)
    one.log.subscribe()
    one.store(*range(19))
    again = Reader(one.log.subscribe(epoch, number))
    again.number = number
    again.read()
    assert again.num_snapshots == num_snapshots
    missed = range(19) if num_snapshots else range(number, 19)
    assert again.keys(DEVICE) == {key(i) for i in missed}
    assert again.number == 19


def test_one_who_waits_is_woken_once_and_not_after_closing():
    one = Log()
    subscription, woken = one.log.subscribe(), list[str]()
    one.store(0)
    Reader(subscription).read()
    subscription.call_when_more(lambda: woken.append("late"))
    one.store(1, 2)
    assert woken == ["late"]
    subscription.call_when_more(lambda: woken.append("at once"))
    assert woken == ["late", "at once"]
    while subscription.take(MOST):
        pass
    subscription.call_when_more(lambda: woken.append("closed"))
    subscription.close()
    one.store(3)
    assert woken == ["late", "at once"]


def test_threads_tell_and_read_at_once_without_a_gap():
    log, final = EventLog("now"), dict[int, set[Key]]()
    started = threading.Barrier(4)

    def holder(replica: int) -> Callable[[OnChange], None]:
        def tell(on_change: OnChange) -> None:
            held = set[Key]()
            started.wait()
            for i in range(2_000):
                one = key(i * 7 % 50)
                change = Change.REMOVED if one in held else Change.STORED
                on_change(change, [one])
                held ^= {one}
            final[replica] = held

        def follow(on_change: OnChange) -> None:
            threads.append(threading.Thread(target=tell, args=(on_change,)))
            threads[-1].start()

        return follow

    threads: list[threading.Thread] = []
    for replica in range(3):
        log.add(replica, DEVICE, holder(replica))
    readers = [Reader(log.subscribe())]
    started.wait()
    while any(thread.is_alive() for thread in threads):
        if len(readers) < 10:
            readers.append(Reader(log.subscribe()))
        for reader in readers:
            reader.read(most=100, batches=3)
    for reader in readers:
        reader.read()
        assert {replica: reader.keys(DEVICE, replica) for replica in range(3)} == final
    assert all(b.number == a.number for a, b in pairwise(readers))
