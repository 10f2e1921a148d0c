"""Records: what is written is read, and nothing else is."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.counts import Miss
from cache.tiers.record import HEADER_BYTES, RecordFormat
from tests.cache.tiers.fake_store import FORM, IMAGE_BYTES, image, key

RECORD = FORM.encode(key(1), image(key(1)))


@given(st.binary(min_size=IMAGE_BYTES, max_size=IMAGE_BYTES))
def test_image_is_read_as_it_was_written(content: bytes):
    record = FORM.encode(key(7), content)
    assert len(record) == FORM.record_bytes
    assert FORM.decode(key(7), record) == content


def test_format_is_that_of_version_1():
    """Caches on disk outlive a release: a change of the format needs a new version."""
    content = bytes(range(64)) * 2
    expected = b"weftpage" + struct.pack("<I", 1) + b"0123456789abcdef" + key(1)
    expected += struct.pack("<Q", 128) + bytes(8) + struct.pack("<I", 0x598CBAF9) + content
    assert FORM.encode(key(1), content) == expected


def test_array_is_an_image():
    array = np.arange(IMAGE_BYTES // 4, dtype=np.int32)
    assert FORM.decode(key(1), FORM.encode(key(1), array)) == array.tobytes()


def test_image_is_aligned_for_arrays():
    assert HEADER_BYTES % 64 == 0


@given(st.integers(0, len(RECORD) - 1), st.integers(1, 255))
def test_any_byte_that_changed_is_noticed(place: int, change: int):
    spoiled = bytearray(RECORD)
    spoiled[place] ^= change
    assert isinstance(FORM.decode(key(1), bytes(spoiled)), Miss)


@pytest.mark.parametrize("num_bytes", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(RECORD) - 1])
def test_record_cut_short_is_truncated(num_bytes: int):
    assert FORM.decode(key(1), RECORD[:num_bytes]) is Miss.TRUNCATED


def test_record_with_more_behind_it_is_corrupt():
    assert FORM.decode(key(1), RECORD + b"\0") is Miss.CORRUPT


def test_changed_image_is_corrupt():
    assert FORM.decode(key(1), RECORD[:-1] + b"x") is Miss.CORRUPT


def test_zeros_are_corrupt():
    assert FORM.decode(key(1), bytes(len(RECORD))) is Miss.CORRUPT


def test_other_models_page_is_foreign():
    other = RecordFormat(b"fedcba9876543210", IMAGE_BYTES)
    assert other.decode(key(1), RECORD) is Miss.FOREIGN


def test_page_of_another_length_is_foreign():
    other = RecordFormat(FORM.fingerprint, IMAGE_BYTES * 2)
    assert other.decode(key(1), RECORD) is Miss.FOREIGN


def test_other_pages_record_is_that_of_another_key():
    assert FORM.decode(key(2), RECORD) is Miss.OTHER_KEY


def test_record_of_another_version_is_not_read():
    assert FORM.decode(key(1), RECORD[:8] + b"\2" + RECORD[9:]) is Miss.OTHER_VERSION


def test_image_of_another_length_is_refused():
    with pytest.raises(ValueError, match="an image of 3 bytes; this tier's have 128"):
        FORM.encode(key(1), b"abc")


def test_format_says_what_it_needs():
    with pytest.raises(ValueError, match="a fingerprint of 3 bytes; it must have 16"):
        RecordFormat(b"abc", 1)
    with pytest.raises(ValueError, match="image_bytes is 0"):
        RecordFormat(FORM.fingerprint, 0)
