"""Files of contexts: what is wrong with them, crashes, and a directory that fails."""

import errno
import logging
import os
from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.contexts.context import ContextLimits, NotSaved
from cache.contexts.record import RecordFormat
from cache.contexts.registry import Contexts
from cache.tiers.counts import Miss

FINGERPRINT = bytes(range(16))
LIMITS = ContextLimits(max_tokens=100)
FORM = RecordFormat(FINGERPRINT, page_size=4)


def start(directory, fingerprint=FINGERPRINT, **options):
    return Contexts(LIMITS, 4, directory, fingerprint, **options)


def made(num_tokens=9):
    return Contexts(LIMITS, 4).create("a", range(num_tokens), display_name="x", ttl_s=100)


def names(contexts):
    return sorted(context.name for context in contexts.all())


def failing(number):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    return fail


@given(
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    words=st.tuples(*[st.text(st.characters(exclude_categories=()))] * 3),
    messages=st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.text())),
    times=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3),
)
def test_what_is_encoded_is_decoded(token_ids, words, messages, times):
    context = replace(
        made(),
        **dict(zip(("tenant", "cache_salt", "display_name"), words, strict=True)),
        **dict(zip(("create_time", "update_time", "expire_time"), times, strict=True)),
        token_ids=array("I", token_ids),
        messages=tuple(messages),
    )
    found = FORM.decode(context.name, FORM.encode(context))
    assert replace(found, keys=()) == replace(context, keys=())


def test_every_beginning_of_a_record_is_truncated():
    context = made()
    record = FORM.encode(context)
    for end in range(len(record)):
        assert FORM.decode(context.name, record[:end]) is Miss.TRUNCATED


def test_every_flipped_bit_is_found():
    context = made(2)
    record = FORM.encode(context)
    for at in range(len(record)):
        for bit in range(8):
            flipped = bytearray(record)
            flipped[at] ^= 1 << bit
            assert isinstance(FORM.decode(context.name, bytes(flipped)), Miss)


def test_a_record_with_more_behind_it_is_corrupt():
    context = made()
    assert FORM.decode(context.name, FORM.encode(context) + b"\0\0\0\0") is Miss.CORRUPT


def test_another_kind_of_file_is_corrupt():
    assert FORM.decode("contexts/0", b"#!/bin/sh\n" * 20) is Miss.CORRUPT


def test_a_fingerprint_has_sixteen_bytes(tmp_path):
    with pytest.raises(ValueError, match="15 bytes; it must have 16"):
        start(tmp_path, b"f" * 15)


def test_files_that_are_not_its_own_are_left_counted_and_warned_of_once(tmp_path, caplog):
    contexts = start(tmp_path)
    corrupt, truncated, versioned, moved, kept = (
        contexts.create("a", range(9)).name.removeprefix("contexts/") for _ in range(5)
    )
    start(tmp_path, b"g" * 16).create("a", [1])

    def change(name, how):
        path = tmp_path / f"{name}.context"
        path.write_bytes(how(path.read_bytes()))

    change(corrupt, lambda record: record[:-1] + bytes([record[-1] ^ 1]))
    change(truncated, lambda record: record[:-1])
    change(versioned, lambda record: record[:8] + bytes([record[8] + 1]) + record[9:])
    (tmp_path / f"{moved}.context").rename(tmp_path / "moved.context")
    (tmp_path / "empty.context").touch()
    (tmp_path / "directory.context").mkdir()
    (tmp_path / "README").write_text("not ours")
    before = sorted(tmp_path.iterdir())
    caplog.clear()

    again = start(tmp_path)
    assert names(again) == [f"contexts/{kept}"]
    assert again.skipped == {
        Miss.CORRUPT: 1,
        Miss.TRUNCATED: 2,
        Miss.OTHER_VERSION: 1,
        Miss.OTHER_KEY: 1,
        Miss.FOREIGN: 1,
        Miss.FAILED: 1,
    }
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "7 files" in warning.getMessage()
    assert sorted(tmp_path.iterdir()) == before


def test_a_crash_before_the_rename_leaves_what_was_and_is_cleared_away(tmp_path):
    contexts = start(tmp_path)
    context = contexts.create("a", [1, 2, 3])
    for name in (context.name.removeprefix("contexts/"), "another"):
        (tmp_path / f"{name}.unfinished").write_bytes(b"weftctxt half of")
    again = start(tmp_path)
    assert again.all() == [context]
    assert not again.skipped
    assert [path.suffix for path in tmp_path.iterdir()] == [".context"]


FAULTS = pytest.mark.parametrize(
    ("function", "number", "words"),
    [
        ("open", errno.EROFS, "Read-only file system"),
        ("fsync", errno.ENOSPC, "No space left"),
        ("replace", errno.EACCES, "Permission denied"),
    ],
)
"""A directory that is read-only, one that is full, and one that stops half-way."""


@FAULTS
def test_a_directory_that_fails_fails_create_and_nothing_is_left(
    tmp_path, monkeypatch, function, number, words
):
    contexts = start(tmp_path)
    kept = contexts.create("a", [1])
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, function, failing(number))
    with pytest.raises(NotSaved, match=rf"2 tokens could not be saved in .*{words}.*; free"):
        contexts.create("a", [1, 2])
    monkeypatch.undo()
    assert contexts.all() == contexts.list("a").contexts == [kept]
    assert sorted(tmp_path.iterdir()) == before


@FAULTS
def test_a_directory_that_fails_fails_update_and_what_was_there_still_is(
    tmp_path, monkeypatch, function, number, words
):
    contexts = start(tmp_path)
    kept = contexts.create("a", [1])
    monkeypatch.setattr(os, function, failing(number))
    with pytest.raises(NotSaved, match=words):
        contexts.update("a", kept.name, [2], ttl_s=1)
    monkeypatch.undo()
    assert contexts.get("a", kept.name) == kept
    assert start(tmp_path).all() == [kept]


def test_a_directory_that_cannot_be_made_fails_create_alone(tmp_path):
    (tmp_path / "file").touch()
    contexts = start(tmp_path / "file" / "contexts")
    assert contexts.skipped == {Miss.FAILED: 1}
    with pytest.raises(NotSaved, match="Not a directory"):
        contexts.create("a", [1])
    assert contexts.all() == []


def test_a_directory_is_made_with_the_first_context_for_its_owner_alone(tmp_path):
    directory = tmp_path / "a" / "b"
    contexts = start(directory)
    assert not directory.exists()
    contexts.create("a", [1])
    [path] = directory.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_delete_that_fails_is_tried_again_when_others_expire(tmp_path, monkeypatch, caplog):
    now_s = 0.0
    contexts = start(tmp_path, clock=lambda: now_s)
    deleted, expired = (contexts.create("a", [1], ttl_s=10).name for _ in range(2))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", failing(errno.EROFS))
        contexts.delete("a", deleted)
        now_s = 10.0
        assert [context.name for context in contexts.expire()] == [expired]
        assert contexts.expire() == []
    assert len(list(tmp_path.iterdir())) == 2
    assert contexts.all() == []
    assert len(caplog.records) == 1
    contexts.expire()
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_a_failed_write_that_cannot_be_deleted_goes_later(tmp_path, monkeypatch):
    contexts = start(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(errno.EIO))
        patch.setattr("pathlib.Path.unlink", failing(errno.EIO))
        with pytest.raises(NotSaved):
            contexts.create("a", [1])
    assert len(list(tmp_path.iterdir())) == 1
    contexts.expire()
    assert list(tmp_path.iterdir()) == []
