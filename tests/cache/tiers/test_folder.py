"""A model's folder in real stores: what is listed, in which order, and what is removed."""

from pathlib import Path

import pytest

from cache.tiers.folder import FOREIGN_S, PREFIX, USED, Folder, open_store
from tests.cache.tiers.fake_store import FORM, FakeStore, key, keys

S = 5.0
OTHER = b"f" * 16
NAME, OTHERS_NAME = (PREFIX + some.hex() for some in (FORM.fingerprint, OTHER))


def write(store: FakeStore, folder: Folder, *numbers: int) -> None:
    for number in numbers:
        store.write(folder.path(key(number)), b"x")


def test_keys_are_listed_as_they_were_saved_then_those_written_since():
    store = FakeStore()
    folder = Folder(store, FORM.fingerprint)
    write(store, folder, 3, 1, 2)
    folder.save_order([key(2), key(9), key(3), key(1)], 5.0, S)
    write(store, folder, 0, 7)
    listed, others = folder.list(S)
    assert listed[:3] == [key(2), key(3), key(1)]
    assert sorted(listed[3:]) == [key(0), key(7)]
    assert others == []


def test_empty_store_has_nothing():
    assert Folder(FakeStore(), FORM.fingerprint).list(S) == ([], [])


def test_names_that_are_no_pages_are_passed_over():
    store = FakeStore()
    folder = Folder(store, FORM.fingerprint)
    mine = NAME
    for name in ("stray", "a/b", f"{mine}/x", f"{mine}/00/{'g' * 32}", f"{mine}/00/{'0' * 31}"):
        store.write(name, b"x")
    assert folder.list(S) == ([], [])


@pytest.mark.parametrize("used", [b"", b"abc", bytes(8) + b"odd"])
def test_spoiled_order_loses_only_the_order(used: bytes):
    store = FakeStore()
    folder = Folder(store, FORM.fingerprint)
    write(store, folder, 1)
    store.write(f"{NAME}/{USED}", used)
    assert folder.list(S) == ([key(1)], [])


def test_other_models_pages_are_named_and_not_listed():
    store = FakeStore()
    write(store, Folder(store, OTHER), 1, 2)
    assert Folder(store, FORM.fingerprint).list(S) == ([], [OTHERS_NAME])


@pytest.mark.parametrize(
    ("age_s", "goes"), [(FOREIGN_S + 1, True), (FOREIGN_S - 1, False), (-9, 0)]
)
def test_other_models_folder_goes_when_it_was_not_in_use_for_long(age_s: float, goes: bool):
    """A clock that was set back removes nothing."""
    store = FakeStore()
    mine, other = Folder(store, FORM.fingerprint), Folder(store, OTHER)
    write(store, mine, 1)
    write(store, other, 2)
    other.save_order(keys(1), 1000.0, S)
    mine.remove_unused(OTHERS_NAME, 1000.0 + age_s, S)
    assert other.list(S)[0] == ([] if goes else [key(2)])
    assert mine.list(S)[0] == [key(1)]


def test_folder_that_does_not_say_when_it_was_used_is_left_alone():
    store = FakeStore()
    mine, other = Folder(store, FORM.fingerprint), Folder(store, OTHER)
    write(store, other, 2)
    mine.remove_unused(OTHERS_NAME, 1e9, S)
    mine.remove_unused(OTHERS_NAME, 1e9 + 2 * FOREIGN_S, S)
    assert other.list(S)[0] == [key(2)]


def test_folders_that_are_not_of_our_making_are_not_others():
    store = FakeStore()
    store.write(f"{OTHER.hex()}/thesis.txt", b"years of work")
    assert Folder(store, FORM.fingerprint).list(S) == ([], [])


def test_folder_on_disk_is_removed_alone(tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    mine, other = Folder(store, FORM.fingerprint), Folder(store, OTHER)
    for folder in (mine, other):
        store.write(folder.path(key(1)), b"x").result()
        folder.save_order(keys(2), 0.0, S)
    (tmp_path / "mine.txt").write_text("not a page")
    mine.remove_unused(OTHERS_NAME, FOREIGN_S + 1, S)
    assert mine.list(S) == ([key(1)], [])
    assert (tmp_path / "mine.txt").exists()


def test_store_that_does_not_answer_is_not_waited_for():
    store = FakeStore()
    store.hanging.add("list")
    with pytest.raises(TimeoutError):
        Folder(store, FORM.fingerprint).list(0.01)


@pytest.mark.parametrize("url", ["/folder", "ftp://x/", "file://folder", ""])
def test_url_of_no_store_is_refused_with_those_there_are(url: str):
    with pytest.raises(ValueError, match=r"there is no store at .* give file:///folder, memory://"):
        open_store(url)


def test_store_in_memory_is_a_store():
    store = open_store("memory://")
    store.write("a", b"x").result()
    assert store.list().result() == [b"a"]
