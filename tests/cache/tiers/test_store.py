"""A store tier: within its budget whatever happens, found again, and a miss at worst."""

import threading
import time
from collections.abc import Buffer, Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.keys import Key
from cache.pins import PinsExceedBudget
from cache.tiers.breaker import FAILURES
from cache.tiers.counts import Decisions, Drop, Miss, TierReport
from cache.tiers.folder import Store, open_store
from cache.tiers.record import RecordFormat
from cache.tiers.store import READ_S, StoreTier
from cache.tiers.writer import WRITES
from tests.cache.tiers.fake_store import (
    DISK_FULL,
    FORM,
    IMAGE_BYTES,
    Clock,
    FakeStore,
    image,
    key,
    keys,
    until,
)

GRACE_S = 5.0


def opened(store: Store, capacity: int = 100, form: RecordFormat = FORM, **more) -> StoreTier:
    """A tier that has listed its store."""
    tier = StoreTier("disk", store, form, capacity * form.record_bytes, **more)
    listed = threading.Event()
    tier.start(listed.set)
    assert listed.wait(GRACE_S)
    return tier


def closed(tier: StoreTier, grace_s: float = GRACE_S) -> TierReport:
    tier.stop(grace_s)
    tier.join()
    return report(tier)


def report(tier: StoreTier) -> TierReport:
    return tier.report(Decisions())


def read(tier: StoreTier, of: Key) -> Buffer | Miss:
    outcome: Future[Buffer | Miss] = Future()
    tier.read(of, outcome.set_result)
    return outcome.result(GRACE_S)


def filled(store: Store, num_pages: int, capacity: int = 100) -> None:
    tier = opened(store, capacity)
    for one in keys(num_pages):
        tier.write(one, image(one))
    assert closed(tier).counts.written == num_pages


def file_of(folder: Path, of: Key) -> Path:
    [found] = folder.rglob(of.hex())
    return found


def test_page_is_found_while_it_is_written_and_after():
    store = FakeStore()
    tier = opened(store)
    store.hanging.add("write")
    tier.write(key(1), image(key(1)))
    assert tier.holds(key(1))
    assert read(tier, key(1)) == image(key(1))
    until(lambda: store.hung)
    store.release()
    until(lambda: report(tier).num_pages == 1)
    assert tier.holds(key(1))
    assert read(tier, key(1)) == image(key(1))
    assert closed(tier).counts.hits == 2


def test_page_is_written_once():
    store = FakeStore()
    tier = opened(store)
    for _ in range(3):
        tier.write(key(1), image(key(1)))
        until(lambda: report(tier).num_pages == 1)
    assert closed(tier).counts.written == 1


def test_restart_finds_what_was_written(tmp_path: Path):
    filled(open_store(tmp_path.as_uri()), 20)
    tier = opened(open_store(tmp_path.as_uri()))
    assert all(tier.holds(one) for one in keys(20))
    assert not tier.holds(key(20))
    assert all(read(tier, one) == image(one) for one in keys(20))
    assert closed(tier).counts.misses == {}


def test_restart_knows_the_order_of_use(tmp_path: Path):
    tier = opened(open_store(tmp_path.as_uri()))
    for one in keys(4):
        tier.write(one, image(one))
    until(lambda: report(tier).num_pages == 4)
    tier.use([key(1), key(2)])
    closed(tier)
    tier = opened(open_store(tmp_path.as_uri()), capacity=2)
    assert [tier.holds(one) for one in keys(4)] == [False, True, True, False]
    closed(tier)
    assert (
        len([path for path in tmp_path.rglob("*") if len(path.name) == 32 and path.is_file()]) == 2
    )


def test_start_does_not_wait_for_the_list_and_writes_nothing_before_it():
    store = FakeStore()
    filled(store, 3)
    store.hanging.add("list")
    tier = StoreTier("disk", store, FORM, 3 * FORM.record_bytes)
    tier.start()
    until(lambda: store.hung)
    num_writes = store.num_calls["write"]
    tier.write(key(7), image(key(7)))
    tier.write(key(1), image(key(1)))
    assert not tier.holds(key(0))
    assert read(tier, key(7)) == image(key(7))
    assert store.num_calls["write"] == num_writes
    store.release()
    until(lambda: report(tier).counts.written == 1)
    assert tier.holds(key(1))
    assert closed(tier).num_pages == 3


def test_list_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cache.tiers.writer.RETRY_S", 0.001)
    store = FakeStore()
    filled(store, 3)
    store.errors["list"] = PermissionError(13, "denied")
    clock = Clock()
    tier = StoreTier("disk", store, FORM, 1000 * FORM.record_bytes, clock=clock)
    tier.start()
    until(lambda: report(tier).counts.errors["EACCES"] == FAILURES)
    assert not tier.holds(key(1))
    store.errors.clear()
    clock.now_s += 1.0
    until(lambda: tier.holds(key(1)))
    closed(tier)


NUMBERS = st.lists(st.integers(0, 30), max_size=60)


@given(NUMBERS, NUMBERS, st.integers(0, 12))
@settings(max_examples=20)
def test_budget_is_never_exceeded_whoever_writes(first: list, second: list, capacity: int):
    store = FakeStore()
    store.delay_s = 0.0001
    tier = opened(store, capacity)

    def write(numbers: list[int]) -> None:
        for number in numbers:
            tier.write(key(number), image(key(number)))
            read(tier, key(number))

    threads = [threading.Thread(target=write, args=(numbers,)) for numbers in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = closed(tier)
    assert store.peak_bytes <= capacity * FORM.record_bytes
    assert len(store.records()) == after.num_pages <= capacity
    assert after.num_queued == 0
    if capacity:
        assert after.counts.drops.total() == 0
        assert after.num_pages == min(capacity, len({*first, *second}))


def test_room_of_writes_that_hang_is_not_given_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cache.tiers.writer.WRITE_S", 0.01)
    store = FakeStore()
    tier = opened(store, capacity=2)
    store.hanging.add("write")
    for one in keys(2):
        tier.write(one, image(one))
    until(lambda: report(tier).counts.drops[Drop.FAILED] == 2)
    store.hanging.clear()
    tier.write(key(5), image(key(5)))
    until(lambda: report(tier).counts.drops[Drop.NO_ROOM] == 1)
    store.release()
    assert closed(tier).num_pages == len(store.records()) == 2
    assert store.peak_bytes == 2 * FORM.record_bytes


def test_page_whose_write_ends_late_may_be_written_again(monkeypatch: pytest.MonkeyPatch):
    """It ends while the page waits in the queue once more."""
    monkeypatch.setattr("cache.tiers.writer.WRITE_S", 0.1)
    store = FakeStore()
    tier = opened(store)
    one, other = keys(2)
    store.hanging.add("write")
    tier.write(one, image(one))
    until(lambda: report(tier).counts.drops[Drop.FAILED] == 1)
    tier.write(other, image(other))
    until(lambda: len(store.hung) == 2)
    tier.write(one, image(one))
    store.hanging.clear()
    store.release()
    until(lambda: not report(tier).num_queued)
    tier.write(key(9), image(key(9)))
    assert closed(tier).num_pages == len(store.records()) == 3


def test_room_of_a_failed_write_is_free():
    store = FakeStore()
    tier = opened(store, capacity=2)
    for error in (DISK_FULL, None):
        store.errors = {"write": error} if error else {}
        for one in keys(2):
            tier.write(one, image(one))
        until(lambda: not report(tier).num_queued)
    assert closed(tier).num_pages == 2


def test_few_writes_are_under_way_at_once():
    store = FakeStore()
    tier = opened(store)
    store.hanging.add("write")
    for one in keys(3 * WRITES):
        tier.write(one, image(one))
    until(lambda: len(store.hung) == WRITES)
    assert report(tier).num_queued == 3 * WRITES
    store.release()
    assert closed(tier).num_pages == 3 * WRITES


def test_what_does_not_fit_the_queue_is_dropped_and_counted():
    store = FakeStore()
    tier = opened(store, queue_pages=3)
    store.hanging.add("write")
    for one in keys(20):
        tier.write(one, image(one))
    drops = report(tier).counts.drops[Drop.QUEUE_FULL]
    # The thread may have taken some of them from the queue.
    assert 20 - 3 - WRITES <= drops <= 20 - 3
    store.release()
    assert closed(tier).counts.written == 20 - drops


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "miss"),
    [
        (lambda file: file.unlink(), Miss.ABSENT),
        (lambda file: file.write_bytes(b""), Miss.TRUNCATED),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), Miss.TRUNCATED),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), Miss.CORRUPT),
        (lambda file: file.write_bytes(FORM.encode(key(2), image(key(2)))), Miss.OTHER_KEY),
    ],
)
def test_spoiled_record_is_a_miss_is_counted_and_goes(tmp_path: Path, spoil: Spoil, miss: Miss):
    filled(open_store(tmp_path.as_uri()), 3)
    tier = opened(open_store(tmp_path.as_uri()))
    file = file_of(tmp_path, key(1))
    spoil(file)
    assert read(tier, key(1)) is miss
    until(lambda: not file.exists())
    assert not tier.holds(key(1))
    assert report(tier).counts.misses == {miss: 1}
    tier.write(key(1), image(key(1)))
    until(lambda: report(tier).num_pages == 3)
    assert read(tier, key(1)) == image(key(1))
    closed(tier)


def test_other_models_pages_are_never_found_and_stay(tmp_path: Path):
    filled(open_store(tmp_path.as_uri()), 3)
    tier = opened(open_store(tmp_path.as_uri()), form=RecordFormat(b"f" * 16, IMAGE_BYTES))
    assert not any(tier.holds(one) for one in keys(3))
    closed(tier)
    tier = opened(open_store(tmp_path.as_uri()))
    assert all(tier.holds(one) for one in keys(3))
    closed(tier)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DISK_FULL, "ENOSPC"),
        (OSError(30, "Read-only file system"), "EROFS"),
        (ValueError("PERMISSION_DENIED: x [os_error_code='13']"), "EACCES"),
    ],
)
def test_store_that_takes_nothing_is_still_read_and_written_to_later(error: Exception, reason: str):
    clock, store = Clock(), FakeStore()
    filled(store, 3)
    tier = opened(store, clock=clock)
    store.errors["write"] = error
    for number in range(10, 10 + FAILURES):
        tier.write(key(number), image(key(number)))
    until(lambda: report(tier).is_off)
    num_calls = store.num_calls["write"]
    tier.write(key(20), image(key(20)))
    assert read(tier, key(1)) == image(key(1))
    assert store.num_calls["write"] == num_calls
    assert report(tier).counts.drops == {Drop.FAILED: FAILURES, Drop.OFF: 1}
    assert report(tier).counts.errors == {reason: FAILURES}
    store.errors.clear()
    clock.now_s += 1.0
    tier.write(key(20), image(key(20)))
    until(lambda: report(tier).num_pages == 4)
    assert not report(tier).is_off
    closed(tier)


def test_pages_that_cannot_be_deleted_still_count():
    store = FakeStore()
    tier = opened(store, capacity=2)
    for one in keys(2):
        tier.write(one, image(one))
    until(lambda: report(tier).num_pages == 2)
    store.errors["delete"] = OSError(30, "Read-only file system")
    tier.write(key(5), image(key(5)))
    until(lambda: report(tier).counts.drops[Drop.NO_ROOM] == 1)
    assert read(tier, key(0)) == image(key(0))
    store.errors.clear()
    tier.write(key(5), image(key(5)))
    assert closed(tier).num_pages == len(store.records()) == 2
    assert store.peak_bytes == 2 * FORM.record_bytes


def test_store_that_cannot_be_read_is_off_for_a_while():
    clock, store = Clock(), FakeStore()
    filled(store, 1)
    tier = opened(store, clock=clock)
    store.errors["read"] = OSError(5, "Input/output error")
    for _ in range(FAILURES):
        assert read(tier, key(0)) is Miss.FAILED
    assert not tier.holds(key(0))
    assert read(tier, key(0)) is Miss.OFF
    store.errors.clear()
    clock.now_s += 1.0
    assert tier.holds(key(0))
    assert read(tier, key(0)) == image(key(0))
    closed(tier)


def test_failures_that_are_not_in_a_row_switch_nothing_off():
    store = FakeStore()
    filled(store, 1)
    tier = opened(store)
    for number in range(3 * FAILURES):
        store.errors = {"read": OSError(5, "Input/output error")} if number % FAILURES else {}
        read(tier, key(0))
    assert tier.holds(key(0))
    assert report(tier).counts.misses == {Miss.FAILED: 3 * (FAILURES - 1)}
    closed(tier)


def test_store_whose_reads_hang_is_off_for_a_while():
    clock, store = Clock(), FakeStore()
    filled(store, 1)
    tier = opened(store, clock=clock)
    store.hanging.add("read")
    for _ in range(FAILURES):
        tier.read(key(0), lambda outcome: None)
    clock.now_s += READ_S + 0.1
    assert read(tier, key(0)) is Miss.OFF
    assert report(tier).counts.errors == {"timeout": FAILURES}
    store.hung.clear()
    closed(tier)


def test_pinned_pages_stay_across_any_number_of_writes():
    store = FakeStore()
    tier = opened(store, capacity=4)
    tier.pin(keys(3))
    for one in keys(30):
        tier.write(one, image(one))
    after = closed(tier)
    assert all(one.hex() in "".join(store.records()) for one in keys(3))
    assert after.num_pages == 4
    with pytest.raises(PinsExceedBudget):
        tier.pin([key(10), key(11)])


def test_clearing_deletes_what_is_not_pinned():
    store = FakeStore()
    tier = opened(store, capacity=4)
    tier.pin([key(2)])
    for one in keys(4):
        tier.write(one, image(one))
    until(lambda: report(tier).num_pages == 4)
    tier.clear()
    assert [tier.holds(one) for one in keys(4)] == [False, False, True, False]
    until(lambda: len(store.records()) == 1)
    tier.write(key(9), image(key(9)))
    assert closed(tier).num_pages == len(store.records()) == 2


def test_write_that_ends_after_a_clearing_leaves_nothing():
    store = FakeStore()
    tier = opened(store)
    store.hanging.add("write")
    for one in keys(3 * WRITES):
        tier.write(one, image(one))
    until(lambda: len(store.hung) == WRITES)
    tier.clear()
    assert not any(tier.holds(one) for one in keys(3 * WRITES))
    assert not tier.await_cleared(0.01)
    store.release()
    assert tier.await_cleared(GRACE_S)
    assert store.records() == {}
    tier.write(key(0), image(key(0)))
    until(lambda: report(tier).num_pages == 1)
    assert closed(tier).num_pages == len(store.records()) == 1


def test_write_that_ends_long_after_a_clearing_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cache.tiers.writer.WRITE_S", 0.01)
    store = FakeStore()
    tier = opened(store)
    store.hanging.add("write")
    tier.write(key(0), image(key(0)))
    until(lambda: report(tier).counts.drops[Drop.FAILED] == 1)
    tier.clear()
    assert tier.await_cleared(GRACE_S)
    time.sleep(0.02)  # until the thread waits for something to do
    store.release()
    until(lambda: not store.records())
    assert closed(tier).num_pages == 0


def test_page_written_anew_outlasts_what_was_written_before_a_clearing(
    monkeypatch: pytest.MonkeyPatch,
):
    """Whichever of the two writes ends first."""
    monkeypatch.setattr("cache.tiers.writer.WRITE_S", 0.01)
    store = FakeStore()
    tier = opened(store, capacity=3)
    for is_first_first in (True, False):
        tier.clear()
        assert tier.await_cleared(GRACE_S)
        store.hanging.add("write")
        for _ in range(3):
            tier.clear()
            num_drops = report(tier).counts.drops[Drop.FAILED]
            tier.write(key(0), image(key(0)))
            until(lambda num=num_drops: report(tier).counts.drops[Drop.FAILED] == num + 1)
        writes, store.hung = store.hung, []
        store.hanging.clear()
        for future, run in writes if is_first_first else reversed(writes):
            future.set_result(run())
        until(lambda: tier.await_cleared(GRACE_S))
        assert report(tier).num_pages == len(store.records()) == 1
        assert read(tier, key(0)) == image(key(0))
    for one in keys(3):
        tier.write(one, image(one))
    assert closed(tier).num_pages == len(store.records()) == 3


def test_what_was_cleared_makes_room_for_what_comes_next():
    store = FakeStore()
    tier = opened(store, capacity=3)
    for one in keys(2):
        tier.write(one, image(one))
    until(lambda: report(tier).num_pages == 2)
    store.hanging.add("write")
    tier.write(key(2), image(key(2)))
    until(lambda: store.hung)
    tier.clear()
    for one in keys(3):
        tier.write(one, image(one))
    store.release()
    until(lambda: not report(tier).num_queued)
    assert report(tier).counts.drops == {}
    assert closed(tier).num_pages == len(store.records()) == 3
    assert store.peak_bytes == 3 * FORM.record_bytes


def test_page_that_is_cleared_before_its_write_begins_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
):
    store = FakeStore()
    tier = opened(store)
    encode = RecordFormat.encode

    def clear_meanwhile(form: RecordFormat, of: Key, content: Buffer) -> bytes:
        tier.clear()
        return encode(form, of, content)

    monkeypatch.setattr(RecordFormat, "encode", clear_meanwhile)
    num_writes = store.num_calls["write"]
    tier.write(key(0), image(key(0)))
    until(lambda: not report(tier).num_queued)
    assert tier.await_cleared(GRACE_S)
    assert store.num_calls["write"] == num_writes
    monkeypatch.undo()
    tier.write(key(0), image(key(0)))
    assert closed(tier).num_pages == 1


def test_pinned_pages_on_their_way_outlast_a_clearing():
    store = FakeStore()
    tier = opened(store)
    tier.pin([key(1), key(2 * WRITES)])
    store.hanging.add("write")
    for one in keys(3 * WRITES):
        tier.write(one, image(one))
    until(lambda: len(store.hung) == WRITES)
    tier.clear()
    store.release()
    assert tier.await_cleared(GRACE_S)
    until(lambda: not report(tier).num_queued)
    assert [one for one in keys(3 * WRITES) if tier.holds(one)] == [key(1), key(2 * WRITES)]
    assert closed(tier).num_pages == len(store.records()) == 2


def test_what_is_listed_after_a_clearing_is_deleted():
    store = FakeStore()
    filled(store, 20)
    store.hanging.add("list")
    tier = StoreTier("disk", store, FORM, 20 * FORM.record_bytes)
    tier.start()
    tier.pin([key(3)])
    tier.clear()
    assert not tier.await_cleared(0.01)
    store.release()
    assert tier.await_cleared(GRACE_S)
    assert [one for one in keys(20) if tier.holds(one)] == [key(3)]
    assert closed(tier).num_pages == len(store.records()) == 1


def test_pages_that_clearing_cannot_delete_take_room_and_are_not_found(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("cache.tiers.writer.RETRY_S", 0.001)
    clock, store = Clock(), FakeStore()
    tier = opened(store, capacity=40, clock=clock)
    for one in keys(40):
        tier.write(one, image(one))
    until(lambda: report(tier).num_pages == 40)
    store.errors["delete"] = OSError(30, "Read-only file system")
    tier.clear()
    assert not tier.await_cleared(GRACE_S)
    assert not any(tier.holds(one) for one in keys(40))
    clock.now_s += 1.0
    tier.write(key(39), image(key(39)))
    until(lambda: report(tier).counts.drops.total() == 1)
    assert len(store.records()) == 40
    store.errors.clear()
    clock.now_s += 10.0
    until(lambda: tier.await_cleared(GRACE_S))
    assert store.records() == {}
    for one in keys(40):
        tier.write(one, image(one))
    assert closed(tier).num_pages == len(store.records()) == 40
    assert store.peak_bytes == 40 * FORM.record_bytes


def test_evicted_page_that_is_not_deleted_until_a_clearing_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
):
    store = FakeStore()
    tier = opened(store, capacity=2)
    for one in keys(2):
        tier.write(one, image(one))
    until(lambda: report(tier).num_pages == 2)
    store.hanging.add("delete")
    tier.write(key(5), image(key(5)))
    until(lambda: store.hung)
    tier.clear()
    [(deletion, _)] = store.hung
    store.hung.clear()
    deletion.set_exception(OSError(5, "Input/output error"))
    until(lambda: store.hung)
    assert not any(tier.holds(one) for one in keys(6))
    store.release()
    assert tier.await_cleared(GRACE_S)
    assert closed(tier).num_pages == len(store.records()) == 0


def test_closing_writes_what_is_queued_within_the_grace_time():
    store = FakeStore()
    store.delay_s = 0.001
    tier = opened(store)
    for one in keys(50):
        tier.write(one, image(one))
    tier.stop(GRACE_S, [(key(60), image(key(60)))])
    tier.join()
    assert report(tier).counts.written == len(store.records()) == 51
    tier.write(key(61), image(key(61)))
    assert report(tier).counts.drops[Drop.CLOSED] == 1


def test_closing_does_not_wait_for_a_store_that_hangs():
    before = set(threading.enumerate())
    store = FakeStore()
    tier = opened(store)
    store.hanging.add("write")
    for one in keys(20):
        tier.write(one, image(one))
    after = closed(tier, grace_s=0.02)
    assert after.counts.drops[Drop.CLOSED] == 20
    assert after.counts.errors == {}
    assert set(threading.enumerate()) <= before
