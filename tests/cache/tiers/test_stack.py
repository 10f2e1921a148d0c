"""The tiers together: what goes down, what comes up, and that nobody waits in vain."""

import random
import threading
import time
from collections.abc import Buffer, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.keys import Key
from cache.pins import PinsExceedBudget
from cache.tiers.counts import Drop, Miss, TierReport
from cache.tiers.fetch import Fetch
from cache.tiers.folder import Store, open_store
from cache.tiers.host import HostTier
from cache.tiers.stack import TierStack
from cache.tiers.store import StoreTier
from cache.tiers.worth import MOST_LOST, REFUSALS, Worth
from tests.cache.tiers.fake_store import (
    DISK_FULL,
    FORM,
    IMAGE_BYTES,
    NUM_THREADS,
    Clock,
    FakeStore,
    image,
    key,
    keys,
    until,
)

GRACE_S = 5.0
DEAR_S = 100.0
"""For each page: any fetch is faster."""


def stack_on(
    *stores: Store,
    host_pages: int = 2,
    capacity: int = 100,
    write_through: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> TierStack:
    """Host memory above these stores, which are listed and measured."""
    tiers = [
        StoreTier(name, store, FORM, capacity * FORM.record_bytes, clock=clock)
        for name, store in zip(["disk", "object"], stores, strict=False)
    ]
    host = HostTier(host_pages * IMAGE_BYTES, IMAGE_BYTES)
    stack = TierStack(host, tiers, write_through=write_through, clock=clock)
    stack.start()
    for tier in tiers:
        stack.worth.observe_fetch(tier.name, 1, 0.0001, 0.0001)
    return stack


def put(stack: TierStack, pages: Sequence[Key]) -> None:
    for one in pages:
        stack.store(one, image(one))


def on(stack: TierStack, name: str) -> TierReport:
    [report] = [report for report in stack.reports() if report.name == name]
    return report


def fetched(stack: TierStack, pages: Sequence[Key], page_s: float = DEAR_S) -> Fetch | None:
    """A fetch that is done."""
    woken = threading.Event()
    recompute_s = [page_s * (i + 1) for i in range(len(pages))]
    fetch = stack.fetch(pages, recompute_s, woken.set)
    if fetch is not None and not fetch.done():
        assert woken.wait(GRACE_S)
        assert fetch.done()
    return fetch


def taken(stack: TierStack, pages: Sequence[Key]) -> list[Key]:
    fetch = fetched(stack, pages)
    if fetch is None:
        return []
    images = fetch.take(1000)
    assert all(content == image(one) for one, content in images)
    return [one for one, _ in images]


def test_what_host_memory_lets_go_is_found_below():
    stack = stack_on(FakeStore())
    put(stack, keys(5))
    assert stack.find(keys(6)) == ["disk"] * 3 + ["host"] * 2
    until(lambda: on(stack, "disk").num_pages == 3)
    stack.close(GRACE_S)


def test_without_host_memory_pages_go_down_at_once():
    stack = stack_on(FakeStore(), host_pages=0)
    put(stack, keys(3))
    assert taken(stack, keys(3)) == keys(3)
    stack.close(GRACE_S)


def test_without_stores_there_is_host_memory():
    stack = stack_on()
    put(stack, keys(3))
    assert stack.find([key(1), key(2)]) == ["host", "host"]
    assert taken(stack, [key(1), key(2), key(0)]) == [key(1), key(2)]
    stack.close(GRACE_S)


def test_written_through_pages_are_everywhere():
    disk, remote = FakeStore(), FakeStore()
    stack = stack_on(disk, remote, host_pages=10, write_through=True)
    put(stack, keys(3))
    until(lambda: len(disk.records()) == len(remote.records()) == 3)
    assert stack.find(keys(3)) == ["host"] * 3
    stack.close(GRACE_S)


def test_search_ends_at_the_first_page_that_no_tier_has():
    stack = stack_on(FakeStore(), host_pages=10)
    put(stack, [key(0), key(1), key(3)])
    assert stack.find(keys(4)) == ["host", "host"]
    assert stack.find(keys(4), 1) == ["host"]
    assert stack.find(keys(4), 2) == []
    assert stack.find(keys(4), 3) == ["host"]
    assert stack.find([]) == []
    stack.close(GRACE_S)


def test_fetch_from_host_memory_is_done_at_once():
    stack = stack_on(FakeStore(), host_pages=4)
    put(stack, keys(4))
    fetch = stack.fetch(keys(4), [0.0] * 4, lambda: pytest.fail("it was done already"))
    assert fetch is not None
    assert fetch.done()
    assert fetch.take(1000) == [(one, image(one)) for one in keys(4)]
    stack.close(GRACE_S)


def test_pages_of_several_tiers_come_in_order_and_are_nearer_then():
    disk, remote = FakeStore(), FakeStore()
    stack = stack_on(disk, remote, host_pages=2)
    put(stack, keys(12))
    until(lambda: len(remote.records()) == 10)
    stack.close(GRACE_S)
    stack = stack_on(FakeStore(), remote, host_pages=4)
    until(lambda: on(stack, "object").num_pages == 12)
    stack.store(key(1), image(key(1)))
    assert stack.find(keys(12)) == ["object", "host", *["object"] * 10]
    assert taken(stack, keys(12)) == keys(12)
    assert on(stack, "host").num_pages == 4
    assert on(stack, "object").counts.hits >= 11
    stack.close(GRACE_S)


@pytest.mark.parametrize("spoilt", [0, 7, 19])
def test_spoiled_page_ends_the_fetch_before_it(spoilt: int):
    store = FakeStore()
    stack = stack_on(store, host_pages=0)
    put(stack, keys(20))
    until(lambda: on(stack, "disk").num_pages == 20)
    [name] = [name for name in store.data if name.endswith(key(spoilt).hex())]
    store.data[name] = store.data[name][:-1] + b"?"
    assert taken(stack, keys(20)) == keys(spoilt)
    assert on(stack, "disk").counts.misses == {Miss.CORRUPT: 1}
    assert taken(stack, keys(20)) == keys(spoilt)
    assert on(stack, "disk").counts.misses == {Miss.CORRUPT: 1}
    stack.close(GRACE_S)


def test_tier_that_was_not_measured_is_probed_and_then_used():
    store = FakeStore()
    stack = stack_on(store, host_pages=0)
    put(stack, keys(4))
    until(lambda: on(stack, "disk").num_pages == 4)
    stack.worth = Worth()
    assert fetched(stack, keys(4)) is None
    until(lambda: stack.worth.fetch_s("disk", 4) < 1.0)
    assert taken(stack, keys(4)) == keys(4)
    decisions = on(stack, "disk").decisions
    assert (decisions.recomputed, decisions.probed, decisions.fetched) == (1, 1, 1)
    stack.close(GRACE_S)


def test_tier_slower_than_computing_is_not_waited_for_and_can_win_later():
    store = FakeStore()
    stack = stack_on(store, host_pages=0)
    put(stack, keys(4))
    until(lambda: on(stack, "disk").num_pages == 4)
    for _ in range(7):
        stack.worth.observe_fetch("disk", 4, 0.001, 1.0)
    num_tries = 0
    while fetched(stack, keys(4), page_s=0.2) is None:
        num_tries += 1
        disk = on(stack, "disk")
        until(lambda disk=disk: on(stack, "disk").counts.hits == 4 * disk.decisions.probed)
    # The median of seven turns with the fourth probe, which may be noticed a little later.
    assert 4 * REFUSALS <= num_tries < 5 * REFUSALS
    decisions = on(stack, "disk").decisions
    assert (decisions.recomputed, decisions.probed) == (num_tries, 4)
    stack.close(GRACE_S)


def test_what_a_fetch_took_is_what_the_next_is_expected_to_take():
    store = FakeStore()
    stack = stack_on(store, host_pages=0)
    put(stack, keys(12))
    until(lambda: on(stack, "disk").num_pages == 12)
    store.delay_s = 0.005
    assert taken(stack, keys(12)) == keys(12)
    assert stack.worth.fetch_s("disk", 12) >= 12 / NUM_THREADS * store.delay_s
    stack.close(GRACE_S)


def test_what_host_memory_has_is_taken_where_the_rest_is_computed():
    stack = stack_on(FakeStore(), host_pages=2)
    put(stack, [key(2), key(3), key(0), key(1)])
    assert stack.find(keys(4)) == ["host", "host", "disk", "disk"]
    until(lambda: on(stack, "disk").num_pages == 2)
    fetch = fetched(stack, keys(4), page_s=1e-9)
    assert fetch is not None
    assert [one for one, _ in fetch.take(1000)] == keys(2)
    stack.close(GRACE_S)


@pytest.mark.parametrize("hangs", ["from the first page", "in the middle"])
def test_fetch_that_lags_is_given_up_before_much_is_lost(hangs: str):
    store, page_s, num_pages = FakeStore(), 0.1, 20
    stack = stack_on(store, host_pages=0)
    put(stack, keys(num_pages))
    until(lambda: on(stack, "disk").num_pages == num_pages)
    if hangs == "in the middle":
        store.hanging.add("read")
        stalled = store.read
        num_reads = iter(range(1000))

        def read(name: str, **more):
            store.hanging = set() if next(num_reads) < 5 else {"read"}
            return stalled(name, **more)

        store.read = read  # type: ignore[method-assign]
    else:
        store.hanging.add("read")
    began_s = time.monotonic()
    fetch = fetched(stack, keys(num_pages), page_s)
    lost_s = time.monotonic() - began_s
    assert fetch is not None
    num_taken = len(fetch.take(1000))
    assert num_taken == (5 if hangs == "in the middle" else 0)
    # Beyond the bound: the time in which a busy machine wakes a thread.
    assert lost_s <= num_taken * page_s + MOST_LOST * num_pages * page_s + 0.25
    assert fetch.is_abandoned
    assert on(stack, "disk").decisions.abandoned == 1
    assert stack.worth.fetch_s("disk", num_pages) > 1e9
    store.hanging.clear()
    stack.close(GRACE_S)


def test_cancelled_fetch_wakes_nobody_and_is_no_measurement():
    store = FakeStore()
    stack = stack_on(store, host_pages=2)
    put(stack, keys(6))
    until(lambda: on(stack, "disk").num_pages == 4)
    store.hanging.add("read")
    before_s = stack.worth.fetch_s("disk", 3)
    fetch = stack.fetch(keys(3), [10.0, 20.0, 30.0], lambda: pytest.fail("it was cancelled"))
    assert fetch is not None
    until(lambda: len(store.hung) == 3)
    fetch.cancel()
    assert fetch.done()
    store.release()
    until(lambda: stack.find(keys(3)).count("host") == 2)
    assert fetch.take(1000) == []
    assert stack.worth.fetch_s("disk", 3) == before_s
    assert on(stack, "disk").decisions.abandoned == 0
    stack.close(GRACE_S)


def test_pinned_pages_go_to_their_tier_and_stay():
    store = FakeStore()
    stack = stack_on(store, host_pages=2, capacity=4)
    put(stack, keys(2))
    assert stack.pin("disk", keys(3)) == [key(2)]
    put(stack, [key(2)])
    until(lambda: on(stack, "disk").num_pages == 3)
    put(stack, [key(i) for i in range(10, 40)])
    until(lambda: not on(stack, "disk").num_queued)
    assert stack.find(keys(3)) == ["disk"] * 3
    with pytest.raises(PinsExceedBudget, match="in tier disk"):
        stack.pin("disk", [key(50), key(51)])
    stack.unpin("disk", keys(3))
    put(stack, [key(i) for i in range(40, 80)])
    until(lambda: not on(stack, "disk").num_queued)
    assert stack.find(keys(3)) == []
    stack.close(GRACE_S)


def test_pages_can_be_kept_in_host_memory():
    stack = stack_on(FakeStore(), host_pages=2)
    assert stack.pin("host", [key(0)]) == [key(0)]
    put(stack, keys(5))
    assert stack.find([key(0)]) == ["host"]
    stack.close(GRACE_S)


def test_a_page_is_lacking_where_it_is_nowhere_or_not_where_it_is_pinned():
    stack = stack_on(FakeStore(), host_pages=2)
    assert stack.lacks(key(0))
    put(stack, keys(5))
    until(lambda: on(stack, "disk").num_pages == 3)
    assert stack.find(keys(5)) == ["disk", "disk", "disk", "host", "host"]
    assert not any(map(stack.lacks, keys(5)))
    stack.pin("host", [key(0), key(4)])
    assert [stack.lacks(one) for one in keys(5)] == [True, False, False, False, False]
    put(stack, [key(0)])
    assert not stack.lacks(key(0))
    stack.close(GRACE_S)


def test_unknown_tier_is_refused_with_those_there_are():
    stack = stack_on(FakeStore())
    with pytest.raises(ValueError, match="there is no tier tape; there are host, disk"):
        stack.pin("tape", keys(1))
    stack.close(GRACE_S)


def test_two_tiers_of_one_name_are_refused():
    tiers = [StoreTier("disk", FakeStore(), FORM, 0) for _ in range(2)]
    with pytest.raises(ValueError, match="each needs a name of its own"):
        TierStack(HostTier(0, IMAGE_BYTES), tiers)


def test_sequence_used_on_the_device_stays_below():
    stack = stack_on(FakeStore(), host_pages=3)
    put(stack, keys(3))
    stack.use([key(0), key(1)])
    put(stack, [key(9)])
    assert stack.find([key(0), key(1)]) == ["host", "host"]
    stack.close(GRACE_S)


def test_sequence_that_was_fetched_goes_last_and_from_its_end():
    stack = stack_on(FakeStore(), host_pages=0, capacity=6)
    put(stack, keys(6))
    until(lambda: on(stack, "disk").num_pages == 6)
    assert taken(stack, keys(3)) == keys(3)
    put(stack, [key(i) for i in range(10, 14)])
    until(lambda: not on(stack, "disk").num_queued)
    assert stack.find(keys(3)) == ["disk", "disk"]
    assert stack.find([key(2)]) == []
    stack.close(GRACE_S)


def test_each_tiers_part_must_be_worth_it_by_itself():
    stack = stack_on(FakeStore(), host_pages=2)
    put(stack, [key(2), key(3), key(0), key(1)])
    until(lambda: on(stack, "disk").num_pages == 2)
    fetch = stack.fetch(keys(4), [50.0, 100.0, 100.0, 100.0], lambda: None)
    assert fetch is not None
    assert [one for one, _ in fetch.take(1000)] == keys(2)
    assert on(stack, "disk").decisions.recomputed == 1
    stack.close(GRACE_S)


def test_cleared_tiers_have_nothing():
    store = FakeStore()
    stack = stack_on(store)
    put(stack, keys(6))
    until(lambda: on(stack, "disk").num_pages == 4)
    stack.clear()
    assert all(stack.find([one]) == [] for one in keys(6))
    until(lambda: store.records() == {})
    stack.close(GRACE_S)


@pytest.mark.parametrize("write_through", [True, False])
def test_page_read_before_a_clearing_is_kept_where_it_is_pinned_only(write_through: bool):
    store = FakeStore()
    stack = stack_on(store, write_through=write_through)
    stack.pin("disk", [key(0)])
    num_cleared = stack.num_cleared
    stack.clear()
    for one in keys(3):
        stack.store(one, image(one), num_cleared)
    stack.store(key(3), image(key(3)), stack.num_cleared)
    assert [stack.find([one]) for one in keys(4)] == [["disk"], [], [], ["host"]]
    stack.close(GRACE_S)
    assert len(store.records()) == 2


def test_page_that_arrives_after_a_clearing_is_not_kept():
    store = FakeStore()
    stack = stack_on(store, host_pages=0)
    put(stack, keys(2))
    until(lambda: on(stack, "disk").num_pages == 2)
    store.hanging.add("read")
    fetch = stack.fetch(keys(2), [DEAR_S, 2 * DEAR_S], lambda: None)
    until(lambda: len(store.hung) == 2)
    assert fetch is not None
    reads, store.hung, store.hanging = store.hung, [], {"delete"}
    fetch.cancel()
    stack.clear()
    for future, run in reads:
        future.set_result(run())
    until(lambda: on(stack, "disk").counts.hits == 2)
    store.release()
    stack.await_cleared(GRACE_S)
    stack.close(GRACE_S)
    assert store.records() == {}


def made_after(num_cleared: int) -> bytes:
    return bytes([num_cleared]) * IMAGE_BYTES


def pages_in(store: FakeStore) -> list[tuple[Key, Buffer]]:
    found: list[tuple[Key, Buffer]] = []
    for name, record in store.records().items():
        of = bytes.fromhex(name.rpartition("/")[2])
        content = FORM.decode(of, record)
        assert not isinstance(content, Miss)
        found.append((of, content))
    return found


PINNED = frozenset(keys(2))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["store", "store", "read", "arrive", "fetch", "clear", "hang", "release", "pause"]
        ),
        st.integers(0, 5),
    ),
    min_size=10,
    max_size=40,
)


@given(STEPS, st.booleans(), st.booleans())
@settings(max_examples=80)
def test_nothing_of_before_a_clearing_comes_back_but_what_is_pinned(
    steps: list[tuple[str, int]], is_listed_late: bool, write_through: bool
):
    """A page's image is how often they had been cleared when it was computed."""
    store, num_cleared = FakeStore(), 0
    stack = stack_on(store, host_pages=20)
    put(stack, keys(8))
    stack.close(GRACE_S)
    if is_listed_late:
        store.hanging.add("list")
    stack = stack_on(store, host_pages=3, capacity=7, write_through=write_through)
    stack.pin("disk", list(PINNED))
    reading: list[tuple[Key, bytes, int]] = []
    fetches: list[Fetch] = []

    def is_known(of: Key, found: Buffer) -> bool:
        return of in PINNED or bytes(found) == made_after(num_cleared)

    for step, number in steps:
        match step:
            case "store":
                stack.store(key(number), made_after(num_cleared))
            case "read":
                reading.append((key(number), made_after(num_cleared), stack.num_cleared))
            case "arrive" if reading:
                stack.store(*reading.pop(0))
            case "fetch":
                pages = [key(number), key(number + 1)]
                fetch = stack.fetch(pages, [DEAR_S, 2 * DEAR_S], lambda: None)
                fetches += [fetch] if fetch else []
            case "clear":
                for fetch in fetches:
                    fetch.cancel()
                stack.clear()
                num_cleared += 1
            case "hang":
                store.hanging.add(["read", "write", "delete"][number % 3])
            case "release":
                store.release()
            case "pause":
                time.sleep(0.0001 * number)
        if num_cleared:
            taken = [page for fetch in fetches for page in fetch.take(1)]
            assert all(is_known(*page) for page in taken)
    until(lambda: store.release() or not (store.hung or on(stack, "disk").num_queued))
    stack.await_cleared(GRACE_S)
    assert not num_cleared or all(is_known(*page) for page in pages_in(store))
    stack.close(GRACE_S)
    assert not num_cleared or all(is_known(*page) for page in pages_in(store))


def test_restart_finds_what_host_memory_and_disk_had_and_knows_what_reading_takes(tmp_path: Path):
    stack = stack_on(open_store(tmp_path.as_uri()))
    put(stack, keys(9))
    stack.close(GRACE_S)
    disk = StoreTier("disk", open_store(tmp_path.as_uri()), FORM, 100 * FORM.record_bytes)
    stack = TierStack(HostTier(100 * IMAGE_BYTES, IMAGE_BYTES), [disk])
    stack.start()
    until(lambda: stack.worth.fetch_s("disk", 9) < 5.0)
    assert stack.find(keys(10)) == ["disk"] * 9
    assert taken(stack, keys(9)) == keys(9)
    assert stack.find(keys(9)) == ["host"] * 9
    stack.close(GRACE_S)


def test_close_wakes_who_waits_and_leaves_no_thread():
    before = set(threading.enumerate())
    store = FakeStore()
    stack = stack_on(store, host_pages=0)
    put(stack, keys(3))
    until(lambda: on(stack, "disk").num_pages == 3)
    store.hanging.add("read")
    woken = threading.Event()
    fetch = stack.fetch(keys(3), [100.0, 200.0, 300.0], woken.set)
    until(lambda: store.hung)
    stack.close(0.5)
    assert woken.is_set()
    assert fetch is not None
    assert fetch.done()
    assert set(threading.enumerate()) <= before


def test_whatever_the_store_does_pages_are_right_or_missing():
    """Nothing is raised, no wrong image comes, and the budget holds."""
    store, chance = FakeStore(), random.Random(5)
    clock = Clock()
    stack = stack_on(store, host_pages=3, capacity=12, clock=clock)
    faults = [DISK_FULL, OSError(5, "I/O"), PermissionError(13, "denied")]
    for _ in range(400):
        clock.now_s += 0.5
        if chance.random() < 0.2:
            store.errors = {}
        if chance.random() < 0.1:
            operation = chance.choice(["read", "write", "delete"])
            store.errors[operation] = chance.choice(faults)
        if chance.random() < 0.1 and store.records():
            name = chance.choice(list(store.records()))
            store.data[name] = store.data.get(name, b"")[: chance.randrange(IMAGE_BYTES)]
        first = chance.randrange(30)
        pages = [key(i) for i in range(first, first + chance.randrange(1, 6))]
        if chance.random() < 0.5:
            put(stack, pages)
        else:
            found = taken(stack, pages)
            assert found == pages[: len(found)]
        stack.use(pages)
    store.errors = {}
    stack.close(GRACE_S)
    assert store.peak_bytes <= 12 * FORM.record_bytes
    assert len(store.records()) <= 12
    report = on(stack, "disk")
    assert report.counts.errors
    assert report.counts.hits
    assert report.counts.drops[Drop.FAILED]
