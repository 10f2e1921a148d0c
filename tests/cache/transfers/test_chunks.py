"""Records in pieces: whatever happens to the pieces, a page is right or it is not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.counts import Miss
from cache.tiers.record import RecordFormat
from cache.transfers import chunks
from cache.transfers.chunks import Assembler, BrokenTransfer, Chunk, chunks_of

FORM = RecordFormat(b"f" * 16, 150)
KEYS = [bytes([number]) * 16 for number in range(4)]
IMAGES = [bytes([100 + number]) * 150 for number in range(4)]
FIRST = 3


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64)


def sent(form=FORM):
    return [
        chunk
        for number, (key, image) in enumerate(zip(KEYS, IMAGES, strict=True), FIRST)
        for chunk in chunks_of(number, form.encode(key, image))
    ]


def received(some):
    """The images of what comes, and why it ended early, if it did."""
    assembler, images = Assembler(FORM, KEYS, FIRST), []
    try:
        for chunk in some:
            image = assembler.add(chunk)
            if image is not None:
                images.append(bytes(image))
        assembler.finish()
    except BrokenTransfer as error:
        return images, error.reason
    return images, None


def test_what_is_sent_is_received():
    assert len(sent()) == 4 * 4
    assert received(sent()) == (IMAGES, None)


def test_another_models_pages_are_not_taken():
    other = RecordFormat(b"g" * 16, 150)
    assert received(sent(other)) == ([], Miss.FOREIGN)


def test_pages_of_other_tokens_are_not_taken():
    swapped = [Chunk(FIRST, c.offset, c.data) for c in sent() if c.page == FIRST + 1]
    assert received(swapped) == ([], Miss.OTHER_KEY)


def test_more_than_a_record_is_not_taken():
    *most, last = sent()[:4]
    assert received([*most, Chunk(last.page, last.offset, bytes(last.data) + b"x")])[0] == []


def test_more_than_was_asked_for_is_not_taken():
    _, reason = received([*sent(), Chunk(FIRST + 4, 0, b"x")])
    assert reason is Miss.CORRUPT


@given(st.data())
def test_of_what_a_wire_damages_only_a_right_beginning_is_taken(data):
    some = sent()
    at = data.draw(st.integers(0, len(some) - 1))
    match data.draw(st.sampled_from(["drop", "double", "swap", "flip", "cut", "end"])):
        case "drop":
            del some[at]
        case "double":
            some.insert(at, some[at])
        case "swap":
            other = data.draw(st.integers(0, len(some) - 1).filter(lambda other: other != at))
            some[at], some[other] = some[other], some[at]
        case "flip":
            damaged = bytearray(some[at].data)
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
            some[at] = some[at]._replace(data=bytes(damaged))
        case "cut":
            some[at] = some[at]._replace(data=bytes(some[at].data)[:-1])
        case "end":
            del some[at:]
    images, reason = received(some)
    assert images == IMAGES[: len(images)]
    assert reason is not None
    assert len(images) < len(IMAGES) or some[: len(sent())] == sent()
